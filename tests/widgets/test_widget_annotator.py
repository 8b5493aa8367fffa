"""The annotator: its tools by hand-made strokes, its folder by what is there after a crash, its messages."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from daamlib import datasets, metrics
from daamlib.cityscapes import BY_ID, BY_NAME
from daamlib.classes import VOC
from daamlib.datasets import folder as files
from daamlib.widgets import annotate
from daamlib.widgets.annotator import HERE
from daamlib.widgets.editor import UNDO, LabelEditor, grow, inside, region, stroke
from daamlib.widgets.session import AnnotationSession
from daamlib_lab.urban.dataset import render_dataset
from daamlib_lab.urban.scenes import HELD_OUT, render

CAR, PERSON = BY_NAME["car"].id, BY_NAME["person"].id
SHAPE = 24, 32
CLASSES = ["car", "person"]


def pictures(count=3):
    return list(np.random.default_rng(0).integers(0, 256, (count, *SHAPE, 3), np.uint8))


@pytest.fixture
def editor():
    return LabelEditor(pictures()[0])


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "masks"


@pytest.fixture
def session(folder):
    return AnnotationSession(pictures(), CLASSES, folder)


def brush(points=((10, 10),), radius=3, value=CAR):
    return {"type": "brush", "points": points, "radius": radius, "value": value}


def on_disk(folder, number, part="labels"):
    with Image.open(folder / files.file_name(part, number)) as image:
        assert image.mode == ("L" if part == "labels" else "RGB")
        return np.array(image)


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# -- tools -------------------------------------------------------------------------------------------------------


def test_a_point_is_where_the_pointer_is():
    under = stroke([[10.5, 4.5]], 0.5, SHAPE)  # x, y of a pixel's centre
    assert np.argwhere(under).tolist() == [[4, 10]]
    assert stroke([[0, 0]], 0.5, SHAPE)[0, 0]
    assert stroke([[10, 4]], 0.1, SHAPE).any()  # however thin, between pixels


def test_a_stroke_is_all_that_is_near_its_line():
    points, radius = [[4, 5], [25, 18], [25, 30]], 3.0
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] + 0.5
    distance = np.full(SHAPE, np.inf)
    for (ax, ay), (bx, by) in zip(points[:-1], points[1:], strict=True):
        dx, dy = bx - ax, by - ay
        t = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
        distance = np.minimum(distance, np.hypot(x - ax - t * dx, y - ay - t * dy))
    under = stroke(points, radius, SHAPE)
    assert under[distance < radius - 0.3].all() and not under[distance > radius].any()


def test_a_polygon_is_its_inside():
    where = inside([[2, 3], [20, 3], [20, 15], [2, 15]], SHAPE)
    assert where[4:14, 3:19].all()
    assert where.sum() == 12 * 18  # 3 ... 15 by 2 ... 20
    assert inside([[-50, -50], [200, -50], [200, 200], [-50, 200]], SHAPE).all()


def test_fill_takes_what_hangs_together(editor):
    editor.polygon([[4, 4], [28, 4], [28, 20], [4, 20]], CAR)
    editor.polygon([[8, 8], [24, 8], [24, 16], [8, 16]], 0)
    hole = editor.labels == 0
    hole[:4] = hole[20:] = False
    hole[:, :4] = hole[:, 28:] = False
    editor.fill([[12.5, 12.5]], PERSON)
    np.testing.assert_array_equal(editor.labels == PERSON, hole)
    corners = np.zeros((2, 2), np.uint8)
    corners[0, 0] = corners[1, 1] = 1
    assert region(corners, [[0.5, 0.5]]).sum() == 1  # not over a corner
    with pytest.raises(ValueError, match="outside"):
        editor.fill([[32.5, 3]], CAR)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "points"),
        ([[1, 2, 3]], "points"),
        ([["a", "b"]], "points"),
        ([[1, float("nan")]], "finite"),
        (None, "points"),
    ],
)
def test_bad_points(editor, points, message):
    with pytest.raises(ValueError, match=message):
        editor.brush(points, 3, CAR)
    assert not editor.can_undo


def test_other_bad_strokes(editor):
    for radius in (0, -1, 1000, float("nan")):
        with pytest.raises(ValueError, match="radius"):
            editor.brush([[1, 2]], radius, CAR)
    with pytest.raises(ValueError, match="points"):
        editor.polygon([[1, 2], [3, 4]], CAR)
    editor.brush([[1e300, 5], [5, 5]], 3, CAR)  # ends, and soon
    with pytest.raises(ValueError, match="labels"):
        LabelEditor(pictures()[0], np.zeros((32, 24), np.uint8))


def test_undo_goes_back_step_by_step(editor):
    seen = [editor.labels]
    for x in range(5, 30, 5):
        editor.brush([[x, 10]], 3, CAR)
        seen.append(editor.labels)
    editor.brush([[10, 10]], 2, 0)
    assert (editor.labels != seen[-1]).any()
    while editor.can_undo:
        editor.undo()
        np.testing.assert_array_equal(editor.labels, seen.pop())
    editor.undo()
    assert not editor.labels.any()
    for _ in range(UNDO + 20):
        editor.brush([[5, 5]], 1, CAR)
    assert editor.can_undo == UNDO


def test_the_arguments_are_left_as_they_are():
    image, labels = pictures()[0], np.full(SHAPE, PERSON, np.uint8)
    editor = LabelEditor(image, labels)
    editor.brush([[5, 5]], 3, CAR)
    editor.labels[:] = 7  # a copy
    assert (labels == PERSON).all() and set(np.unique(editor.labels)) == {CAR, PERSON}
    np.testing.assert_array_equal(image, pictures()[0])


# -- scribbles that grow -----------------------------------------------------------------------------------------


def two_halves():
    image = np.random.default_rng(0).integers(0, 20, (*SHAPE, 3), np.uint8)
    image[:, 18:] += 150
    return image


def test_scribbles_grow_to_the_edges():
    editor = LabelEditor(two_halves())
    editor.grow([[25, 4], [25, 20]], 1, CAR)
    np.testing.assert_array_equal(editor.labels == CAR, stroke([[25, 4], [25, 20]], 1, SHAPE))  # painted until then
    editor.grow([[3, 12]], 1, 0)
    assert (editor.labels[:, 18:] == CAR).all() and not editor.labels[:, :18].any()
    editor.grow([[3, 3]], 1, PERSON)  # of a third kind
    assert (editor.labels[:, 18:] == CAR).all() and editor.labels[3, 3] == PERSON
    for _ in range(3):
        editor.undo()
    assert not editor.labels.any()


def test_what_grows_from_unlabeled_leaves_what_was_there():
    editor = LabelEditor(two_halves(), np.full(SHAPE, PERSON, np.uint8))
    editor.grow([[25, 12]], 1, CAR)
    editor.grow([[3, 12]], 1, 0)
    assert (editor.labels[:, 18:] == CAR).all()
    erased = editor.labels == 0
    np.testing.assert_array_equal(erased, stroke([[3, 12]], 1, SHAPE))
    assert (editor.labels[:, :18][~erased[:, :18]] == PERSON).all()


def test_another_tool_ends_the_scribbles():
    editor = LabelEditor(two_halves())
    editor.grow([[25, 12]], 1, CAR)
    editor.brush([[10, 20]], 2, PERSON)
    editor.grow([[3, 12]], 1, 0)  # alone: nothing to grow from
    assert (editor.labels == CAR).sum() < 20
    editor.undo()
    editor.undo()
    editor.grow([[3, 12]], 1, 0)  # taken up again
    assert (editor.labels[:, 18:] == CAR).all()


@pytest.mark.parametrize("shape", [(300, 530), (520, 301)])
def test_large_images_are_walked_in_blocks(shape):
    image = np.random.default_rng(0).integers(0, 20, (*shape, 3), np.uint8)
    image[:, 200:] += 150
    seeds = np.zeros(shape, int)
    seeds[100:110, 20:30], seeds[100:110, 250:260] = 1, 27
    grown = grow(image, seeds)
    assert grown.shape == shape and set(np.unique(grown)) == {1, 27}
    assert (grown[:, 203:] == 27).all() and (grown[:, :197] == 1).all()


def test_scribbles_that_cannot_grow_are_refused_and_change_nothing():
    flat = LabelEditor(np.full((*SHAPE, 3), 9, np.uint8))
    flat.grow([[25, 12]], 1, CAR)
    with pytest.raises(ValueError, match="flat"):
        flat.grow([[3, 12]], 1, 0)
    assert flat.can_undo == 1
    with pytest.raises(ValueError, match="scribble"):
        grow(two_halves(), np.zeros(SHAPE, int))
    seeds = np.zeros((600, 600), int)
    seeds[0, 0], seeds[0, 1] = 1, 2
    with pytest.raises(ValueError, match="close"):
        grow(np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8), seeds)
    everywhere = np.ones(SHAPE, int)
    everywhere[0] = 2
    np.testing.assert_array_equal(grow(two_halves(), everywhere), everywhere)


def test_two_scribbles_make_a_mask_of_a_person():
    scene = render(HELD_OUT + 3, 128)
    editor = LabelEditor(np.array(scene.image))
    editor.grow(128 * np.array([(0.53, 0.08), (0.52, 0.3), (0.5, 0.45), (0.48, 0.62)]), 3, PERSON)
    around = [(0.33, 0.1), (0.33, 0.6), (0.42, 0.72), (0.62, 0.72), (0.75, 0.5), (0.75, 0.25), (0.65, 0.05)]
    editor.grow(128 * np.array(around), 3, 0)
    assert metrics.iou(editor.labels == PERSON, scene.labels == PERSON) > 0.75


# -- the folder --------------------------------------------------------------------------------------------------


def test_each_stroke_is_on_disk(session, folder):
    assert contents(folder) == ["annotation.json"] and session.done == 0
    session.apply(brush())
    np.testing.assert_array_equal(on_disk(folder, 0), session.labels)
    np.testing.assert_array_equal(on_disk(folder, 0, "images"), pictures()[0])
    session.apply({"type": "polygon", "points": [[1, 1], [9, 1], [9, 9]], "value": PERSON})
    session.apply({"type": "fill", "points": [[30, 20]], "value": PERSON})
    session.apply({"type": "grow", "points": [[20, 20]], "radius": 2, "value": CAR})
    session.apply(brush([[5, 5]], 2, 0))
    np.testing.assert_array_equal(on_disk(folder, 0), session.labels)
    session.apply({"type": "undo"})
    np.testing.assert_array_equal(on_disk(folder, 0), session.labels)
    assert contents(folder) == ["annotation.json", "images/00000.png", "labels/00000.png"]
    assert (session.done, session.saved) == (1, "saved as labels/00000.png")


def test_an_image_that_was_only_looked_at_is_not_done(session, folder):
    session.apply({"type": "go", "position": 1})
    assert session.done == 0
    session.apply(brush())
    session.apply({"type": "undo"})
    assert session.done == 0 and not (folder / "labels/00001.png").exists()
    session.apply({"type": "save"})  # there is no car on it, says the one who draws
    assert session.done == 1 and not on_disk(folder, 1).any()
    session.apply(brush())
    session.apply({"type": "undo"})
    assert session.done == 1


def test_one_goes_on_where_one_stopped(session, folder):
    session.apply(brush())
    session.apply({"type": "go", "position": 1})
    session.apply(brush(value=PERSON))
    drawn = session.labels
    again = AnnotationSession(pictures(), CLASSES, folder)
    assert (again.position, again.done) == (1, 2)
    np.testing.assert_array_equal(again.labels, drawn)
    again.apply({"type": "undo"})  # of the other session: stays
    assert again.done == 2
    again.apply(brush([[20, 20]]))
    assert set(np.unique(again.labels)) == {0, CAR, PERSON}
    more = AnnotationSession(pictures(4), ["rider"], folder)  # more images, another class
    assert (more.position, more.done) == (1, 2)
    assert AnnotationSession(pictures(1), CLASSES, folder).position == 0


def test_nothing_is_lost_when_the_kernel_is_killed(folder):
    """Killed while it writes the third stroke: the second is there, whole, and one goes on."""
    script = f"""
import os, signal, numpy as np
from PIL import Image
from daamlib.widgets.session import AnnotationSession
images = list(np.random.default_rng(0).integers(0, 256, (3, 24, 32, 3), np.uint8))
session = AnnotationSession(images, ["car", "person"], {str(folder)!r})
for x in (5, 15):
    session.apply({{"type": "brush", "points": [[x, 10]], "radius": 3, "value": {CAR}}})
save = Image.Image.save
def killed(self, path, **options):
    with open(path, "wb") as file:
        file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
Image.Image.save = killed
session.apply({{"type": "brush", "points": [[25, 10]], "radius": 3, "value": {CAR}}})
"""
    ended = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL
    assert len(contents(folder)) == 4  # one of them half-written, under another name
    two = np.zeros(SHAPE, np.uint8)
    two[stroke([[5, 10]], 3, SHAPE) | stroke([[15, 10]], 3, SHAPE)] = CAR
    np.testing.assert_array_equal(on_disk(folder, 0), two)
    session = AnnotationSession(pictures(), CLASSES, folder)
    np.testing.assert_array_equal(session.labels, two)
    assert contents(folder) == ["annotation.json", "images/00000.png", "labels/00000.png"]


def test_a_full_disk_is_said_and_nothing_is_lost(session, folder, monkeypatch):
    session.apply(brush())
    before = on_disk(folder, 0)

    def full(path, image):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_png", full)
        with pytest.raises(OSError, match="space"):
            session.apply(brush([[25, 10]]))
        with pytest.raises(OSError, match="space"):
            session.apply({"type": "go", "position": 1})  # it does not leave what is not saved
        assert session.position == 0
    np.testing.assert_array_equal(on_disk(folder, 0), before)
    session.apply({"type": "go", "position": 1})
    np.testing.assert_array_equal(on_disk(folder, 0), before | np.where(stroke([[25, 10]], 3, SHAPE), CAR, 0))


def test_a_proposal_is_corrected_and_counts_once_it_is_touched(folder):
    proposals = [np.full(SHAPE, value, np.uint8) for value in (CAR, 255, PERSON)]
    proposals[0][:5] = 255
    widget = annotate(pictures(), CLASSES, folder, proposals=proposals)
    assert widget.done == 0 and contents(folder) == ["annotation.json"]
    expected = np.full(SHAPE, CAR)
    expected[:5] = 0
    assert np.array_equal(widget.label_map, expected) and proposals[0][0, 0] == 255
    widget.act(brush(value=PERSON))
    assert widget.done == 1 and np.array_equal(on_disk(folder, 0), widget.label_map)
    assert (widget.label_map == PERSON).any() and (widget.label_map == CAR).any()
    widget.act({"type": "undo"})
    assert widget.done == 0 and np.array_equal(widget.label_map, expected)
    widget.act({"type": "go", "position": 2})
    widget.act({"type": "save"})
    assert widget.done == 1 and (on_disk(folder, 2) == PERSON).all()
    # what is drawn goes before what is proposed
    again = annotate(pictures(), CLASSES, folder, proposals=[np.zeros(SHAPE, np.uint8)] * 3)
    assert (again.label_map == PERSON).all()


@pytest.mark.parametrize(
    ("proposals", "message"),
    [
        ([np.zeros(SHAPE, np.uint8)], "proposals"),
        ([np.zeros((3, 3), np.uint8)] * 3, "proposal"),
        ([np.zeros(SHAPE)] * 3, "float64"),
        ([np.full(SHAPE, 99, np.uint8)] * 3, "99"),
    ],
)
def test_proposals_that_do_not_fit(folder, proposals, message):
    with pytest.raises(ValueError, match=message):
        annotate(pictures(), CLASSES, folder, proposals=proposals)


def test_the_masks_become_labels_of_a_dataset(tmp_path, folder):
    rendered = render_dataset(tmp_path / "scenes", 3)
    session = AnnotationSession(rendered, ["car", "traffic light"], folder)
    np.testing.assert_array_equal(session.image, np.array(rendered.image(0)))
    session.apply({"type": "go", "position": 2})
    session.apply(brush([[20, 20], [90, 90]], 8))
    exact = rendered.labels(1)
    datasets.import_masks(rendered, folder / "labels")
    np.testing.assert_array_equal(rendered.labels(2), session.labels)
    np.testing.assert_array_equal(rendered.labels(1), exact)
    with pytest.raises(ValueError, match="dataset"):
        AnnotationSession(rendered, CLASSES, rendered.folder)


def test_folders_that_are_something_else(folder):
    (folder / "labels").mkdir(parents=True)
    (folder / "labels" / "00000.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="annotation.json"):
        AnnotationSession(pictures(), CLASSES, folder)
    (folder / "annotation.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        AnnotationSession(pictures(), CLASSES, folder)
    (folder / "annotation.json").write_text('{"format": "daamlib-annotation-9", "image": 0}')
    with pytest.raises(ValueError, match="annotation-9"):
        AnnotationSession(pictures(), CLASSES, folder)


def test_any_classes(folder, tmp_path):
    widget = annotate(pictures(), {"cat": (1, (255, 128, 0)), "dog": 2}, folder)
    state = widget.get_state()
    assert [(c["id"], c["name"]) for c in state["classes"]] == [(0, "unlabeled"), (1, "cat"), (2, "dog")]
    assert {int(key): tuple(value) for key, value in state["palette"].items()} == {
        0: (0, 0, 0), 1: (255, 128, 0), 2: (0, 128, 0)
    }  # fmt: skip
    widget.act(brush(value=CAR))
    assert widget.failed and str(CAR) in widget.status
    widget.act(brush(value=2))
    assert set(np.unique(on_disk(folder, 0))) == {0, 2}
    noted = json.loads((folder / "annotation.json").read_text())["classes"]
    assert noted == {"unlabeled": [0, [0, 0, 0]], "cat": [1, [255, 128, 0]], "dog": [2, [0, 128, 0]]}
    again = AnnotationSession(pictures(), ["dog"], folder)  # a name keeps its number
    assert (again.names, again.class_list.ids["dog"]) == (("unlabeled", "dog"), 2)
    for other in ({"dog": 1}, ["bird"], CLASSES, {"bird": 3}):
        with pytest.raises(ValueError, match="drawn with other classes"):
            AnnotationSession(pictures(), other, folder)
    more = AnnotationSession(pictures(), {"cat": 1, "dog": 2, "bird": 3}, folder)
    more.apply(brush(value=3))
    voc = AnnotationSession(pictures(), VOC, tmp_path / "voc")
    assert voc.names[:2] == ("background", "aeroplane") and len(voc.names) == 21
    numbered = AnnotationSession(pictures(), ["cat", "dog"], tmp_path / "numbered")
    assert numbered.class_list.ids == {"unlabeled": 0, "cat": 1, "dog": 2}


def test_drawn_classes_become_those_of_the_dataset(tmp_path, folder):
    rendered = render_dataset(tmp_path / "scenes", 2)
    with pytest.raises(ValueError, match="other classes"):  # its label maps are of Cityscapes
        session = AnnotationSession(rendered, {"car": 1}, folder)
        session.apply(brush(value=1))
        datasets.import_masks(rendered, folder)
    for path in (rendered.folder / "labels").iterdir():
        path.unlink()
    settings = json.loads((rendered.folder / "dataset.json").read_text()) | {"labels": []}
    (rendered.folder / "dataset.json").write_text(json.dumps(settings))
    assert datasets.import_masks(rendered, folder) is rendered  # the annotator's folder itself
    assert rendered.classes.ids == {"unlabeled": 0, "car": 1}
    np.testing.assert_array_equal(rendered.mask(0, "car"), session.labels == 1)
    by_name = AnnotationSession(rendered, ["car"], tmp_path / "more")
    assert by_name.class_list.ids == rendered.classes.ids


def test_files_that_do_not_fit_the_images(session, folder):
    session.apply(brush())
    session.apply({"type": "go", "position": 1})
    other = pictures()[::-1]
    with pytest.raises(ValueError, match="another image"):
        AnnotationSession(other, CLASSES, folder).apply({"type": "go", "position": 0})
    for wrong, message in (
        (np.zeros((4, 4), np.uint8), "image"),
        (np.full(SHAPE, 77, np.uint8), "Cityscapes"),
    ):
        files.write_png(folder / "labels/00000.png", wrong)
        with pytest.raises(ValueError, match=message):
            session.apply({"type": "go", "position": 0})
        assert session.position == 1  # and the session goes on
    session.apply(brush())


@pytest.mark.parametrize(
    ("images", "classes", "error", "message"),
    [
        ([], CLASSES, ValueError, "images"),
        (pictures(), "car", TypeError, "car"),
        (pictures(), ["tree", "car"], ValueError, "tree"),
        (pictures(), {"tree": 255}, ValueError, "255"),
        (pictures(), ["license plate"], ValueError, "license plate"),
        (pictures(), ["unlabeled"], ValueError, "class"),
        ([pictures()[0][..., 0]], CLASSES, ValueError, "uint8"),
        (["image.png"], CLASSES, TypeError, "PIL"),
    ],
)
def test_bad_arguments(folder, images, classes, error, message):
    with pytest.raises(error, match=message):
        annotate(images, classes, folder)
    assert not folder.exists()


# -- messages ----------------------------------------------------------------------------------------------------

BAD = [
    ({"type": "jump"}, "action"),
    (None, "action"),
    ([1], "action"),
    (brush(value=11), "11"),
    (brush(value="car"), "id"),
    (brush(points="x"), "points"),
    (brush(radius="3"), "radius"),
    (brush(radius=None), "radius"),
    ({"type": "fill", "value": CAR}, "points"),
    ({"type": "go", "position": 3}, "position"),
    ({"type": "go", "position": -1}, "position"),
    ({"type": "go"}, "position"),
]


@pytest.mark.parametrize(("action", "message"), BAD)
def test_a_bad_message_is_said_and_the_widget_lives_on(folder, action, message):
    widget = annotate(pictures(), CLASSES, folder)
    revision = widget.revision
    widget.act(action)
    assert widget.failed and message in widget.status and widget.revision == revision + 1
    assert contents(folder) == ["annotation.json"] and not widget.label_map.any()
    widget.act(brush())
    assert not widget.failed and widget.label_map.any() and widget.status == "saved as labels/00000.png"


def test_the_widget_shows_the_session(folder):
    widget = annotate([Image.fromarray(image) for image in pictures()], CLASSES, folder)
    state = widget.get_state()
    assert [(c["id"], c["name"], tuple(c["color"])) for c in state["classes"]] == [
        (BY_NAME[name].id, name, BY_NAME[name].color) for name in ("unlabeled", "car", "person")
    ]
    assert {int(key): tuple(value) for key, value in state["palette"].items()} == {
        number: label.color for number, label in BY_ID.items() if number >= 0
    }
    assert (widget.height, widget.width, widget.count, widget.done, widget.can_undo) == (*SHAPE, 3, 0, False)
    widget.act(brush())
    labels = np.frombuffer(widget.labels, np.uint8).reshape(SHAPE)
    np.testing.assert_array_equal(labels, widget.label_map)
    assert widget.done == 1 and widget.can_undo and widget.folder == folder
    first = widget.picture
    widget.act({"type": "go", "position": 2})
    assert widget.position == 2 and widget.picture != first and not widget.can_undo
    assert json.loads((folder / "annotation.json").read_text())["image"] == 2


def test_the_view_is_in_the_package_and_needs_nothing_from_the_network():
    script, style = ((HERE / name).read_text() for name in ("annotator.js", "annotator.css"))
    assert "export default" in script
    for text in (script, style):
        assert "http:" not in text and "https:" not in text and "import(" not in text and "@import" not in text
