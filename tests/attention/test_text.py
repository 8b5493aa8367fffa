"""Tokens, words and their embeddings."""

import pytest
import tiny_joint
import torch

from daamlib.attention.readers import encode, reader_of
from daamlib.attention.readers.words import BYTE_SPACE, read_pieces, read_tokens
from daamlib.attention.text import TokenEmbeddings, Word, find_phrases, find_word


def tokens_and_words(pipe, text):
    embeddings = encode(pipe, text)
    return embeddings.tokens, embeddings.words


def test_words_are_made_of_their_tokens(sd1_pipe):
    tokens, words = tokens_and_words(sd1_pipe, "a car, a bicycle")
    assert tokens == ("<|startoftext|>", "a", "car", ",", "a", *"bi", "c", "y", "c", "l", "e", "<|endoftext|>")
    assert words == (Word("a", 1, 2), Word("car", 2, 3), Word(",", 3, 4), Word("a", 4, 5), Word("bicycle", 5, 12))


def test_words_of_several_bytes_a_character(sd1_pipe):
    _, words = tokens_and_words(sd1_pipe, "una señal 車")
    assert [word.text for word in words] == ["una", "señal", "車"]


def test_a_word_without_an_end_mark_ends_with_the_text():
    class Tokenizer:
        bos_token_id, eos_token_id = 8, 9

        def get_added_vocab(self):
            return {"<s>": 8, "</s>": 9}

        def convert_ids_to_tokens(self, ids):
            return ["<s>", "ca", "r", "</s>"]

        def decode(self, ids):
            return "car"

    assert read_tokens(Tokenizer(), [8, 1, 2, 9])[1] == (Word("car", 1, 3),)


QWEN = {"mark": BYTE_SPACE, "end": "<|im_end|>"}


@pytest.mark.parametrize(
    ("tokenizer", "options", "end"),
    [
        pytest.param(tiny_joint.t5_tokenizer(64), {}, "", id="T5"),
        pytest.param(tiny_joint.qwen_tokenizer(), QWEN, "<|im_end|>\n<|im_start|>assistant\n", id="Qwen"),
    ],
)
def test_words_begin_at_spaces_and_where_signs_meet_letters(tokenizer, options, end):
    ids = tokenizer("a red traffic light,,, sky" + end).input_ids
    tokens, words = read_pieces(tokenizer, ids, **options)
    assert [word.text for word in words] == ["a", "red", "traffic", "light", ",,,", "sky"]
    assert "".join(tokens[words[4].start : words[4].stop]) == ",,,"
    _, rest = read_pieces(tokenizer, ids, 2, **options)
    assert rest == words[2:]


def test_a_word_whose_tokens_are_parts_of_a_characters_bytes():
    class Tokenizer:
        all_special_ids, get_added_vocab = [4], dict
        pieces = [b"se", b"\xc3", b"\xb1", b"al", b"", b" car", b"\n", b"s"]

        def convert_ids_to_tokens(self, ids):
            return ["se", "Ã", "±", "al", "<unk>", "Ġcar", "Ċ", "s"]

        def decode(self, ids):
            return b"".join(self.pieces[i] for i in ids).decode(errors="replace")

    _, words = read_pieces(Tokenizer(), range(8), mark=BYTE_SPACE)
    assert words == (Word("señal", 0, 4), Word("car", 5, 6), Word("s", 7, 8))


@pytest.mark.parametrize(
    ("word", "rows"),
    [
        ("car", [2]),
        ("CAR", [2]),
        ("bicycle", [5, 6, 7, 8, 9, 10, 11]),
        ("a", [1, 4]),  # every occurrence
        ("traffic light", [13, 14]),  # several words
        ("  traffic   light ", [13, 14]),
        (",", [3]),
    ],
)
def test_find_word(sd1_pipe, word, rows):
    tokens, words = tokens_and_words(sd1_pipe, "a car, a bicycle and traffic light")
    assert find_word(word, words, tokens) == rows


@pytest.mark.parametrize("word", ["tree", "ar", "light traffic", "cycle", "", " "])
def test_a_word_that_is_not_there_lists_the_tokens(sd1_pipe, word):
    tokens, words = tokens_and_words(sd1_pipe, "a car, a bicycle and traffic light")
    with pytest.raises(ValueError, match=r"not in the text; its tokens are \['<\|start.*', 'a', 'car'.*giving its own"):
        find_word(word, words, tokens)


def test_a_word_of_a_text_has_the_embeddings_of_its_tokens(sd1_pipe):
    embeddings = encode(sd1_pipe, "a car and a traffic light")
    rows = find_word("traffic light", embeddings.words, embeddings.tokens)
    assert len(rows) > 1 and torch.equal(embeddings["traffic light"], embeddings.values[rows])
    with pytest.raises(ValueError, match="'tree' is not in the text"):
        embeddings["tree"]


def test_encode_gives_what_the_pipeline_gives_the_unet(pipe):
    text = "a tree in an urban environment"
    expected = pipe.encode_prompt(text, pipe.device, 1, False)[0] if not hasattr(pipe, "tokenizer_2") else None
    if expected is None:
        expected = pipe.encode_prompt(text, device=pipe.device, do_classifier_free_guidance=False)[0]
    short, padded = encode(pipe, text), encode(pipe, text, padding=True)
    assert torch.equal(padded.values, expected[0])
    assert torch.equal(short.values, padded.values[:8])
    assert short.values.shape == (8, pipe.unet.config.cross_attention_dim)
    assert short.tokens[0] == "<|startoftext|>"
    assert short.tokens[-1] == "<|endoftext|>"
    assert padded.tokens == short.tokens + ("<pad>",) * (pipe.tokenizer.model_max_length - 8)
    assert short.length == padded.length == 8
    assert not padded.values.requires_grad


def test_an_empty_text_has_start_and_end_alone(sd1_pipe):
    empty = encode(sd1_pipe, "", padding=True)
    assert empty.words == ()
    assert empty.length == 2
    assert encode(sd1_pipe, "").tokens == ("<|startoftext|>", "<|endoftext|>")


@pytest.mark.parametrize("text", [None, 3, ["a car"], b"a car"])
def test_encode_takes_strings_alone(sd1_pipe, text):
    with pytest.raises(TypeError, match=f"must be a string, got {type(text).__name__}"):
        encode(sd1_pipe, text)


def test_encode_refuses_a_text_over_the_context_length(sd2_pipe):
    assert len(encode(sd2_pipe, "car " * 22).values) == 24
    with pytest.raises(ValueError, match="has 27 tokens .* reads 24: shorten it by 3 tokens"):
        encode(sd2_pipe, "car " * 25)


def test_textual_inversion_of_several_vectors(fresh):
    pipe = fresh("sd1")
    pipe.load_textual_inversion({"<thing>": torch.randn(2, 24)}, token="<thing>")
    short, padded = encode(pipe, "a <thing>"), encode(pipe, "a <thing>", padding=True)
    assert short.tokens == ("<|startoftext|>", "a", "<thing>", "<thing>_1", "<|endoftext|>")
    assert len(short.values) == 5
    assert torch.equal(short.values, padded.values[:5])


def test_a_pipeline_with_its_second_text_encoder_alone(sdxl_pipe, fresh):
    pipe = fresh("sdxl")  # as SDXL's refiner is
    pipe.tokenizer, pipe.text_encoder = None, None
    embeddings = encode(pipe, "a car")
    assert embeddings.tokens == ("<|startoftext|>", "a", "car", "<|endoftext|>")
    assert torch.equal(embeddings.values, encode(sdxl_pipe, "a car").values[:, -16:])


@pytest.mark.parametrize(
    ("text", "word", "tokens"),
    [
        ("a Café by the CAFÉ", "cafe\N{COMBINING ACUTE ACCENT}", ["c", "af", "Ã", "©"] * 2),  # composed or not
        ("traffic-light's end", "Traffic-Light's", ["traffic", "-", "light", "'", "s"]),
        ("a (car:1.5) by trees", "car", ["car"]),
        ("a (car:1.5) by trees", "1.5", ["1", ".", "5"]),
        ("汽车和树 car", "汽车", ["æ", "±", "½", "è", "½", "¦"]),
        ("汽车和树 car", "树", ["æ", "ł", "ĳ"]),
        ("🚗🌳 a car", "🌳", ["ð", "Ł", "Į", "³"]),
        ("a ❤️ car", "❤️", ["â", "Ŀ", "¤", "ï", "¸", "ı"]),
    ],
)
def test_words_in_other_spellings_and_scripts(sd1_pipe, text, word, tokens):
    """The tokens of a word are those that the tokenizer makes of it alone."""
    named = encode(sd1_pipe, text)
    rows = find_word(word, named.words, named.tokens)
    assert [named.tokens[row] for row in rows] == tokens


@pytest.mark.parametrize(("text", "word"), [("a car pet", "carpet"), ("a traffic-light", "traffic light")])
def test_words_that_are_written_otherwise_are_not_found(sd1_pipe, text, word):
    with pytest.raises(ValueError, match=f"'{word}' is not in the text; its tokens are"):
        encode(sd1_pipe, text)[word]


def test_an_occurrence_of_a_word(sd1_pipe):
    named = encode(sd1_pipe, "a car and a car, no bicycle car")
    cars = [row for row, token in enumerate(named.tokens) if token == "car"]
    assert len(cars) == 3
    assert [find_word("car", named.words, named.tokens, i) for i in range(3)] == [[row] for row in cars]
    assert torch.equal(named["car", 1], named.values[cars[1:2]])
    assert torch.equal(named["car", -1], named.values[cars[2:]])
    with pytest.raises(ValueError, match=r"occurs 3 times in .* no \[3\]"):
        named["car", 3]
    for key in (("car", "bus"), ("car", 1, 2), 3.0):
        with pytest.raises(TypeError, match="look up a word"):
            named[key]


def test_occurrences_do_not_overlap(sd1_pipe):
    named = encode(sd1_pipe, "car car car")
    assert find_word("car car", named.words, named.tokens) == [1, 2]


@pytest.mark.parametrize(("name", "vectors"), [("<toy>", 1), ("<toy>", 2), ("<toy>", 12), ("<Toy>", 1), ("toy", 2)])
def test_the_words_of_a_textual_inversion_and_those_after_it(fresh, name, vectors):
    pipe = fresh("sd1")
    pipe.load_textual_inversion({name: torch.randn(vectors, 24)}, token=name)
    text = f"a {name} car, a car {name} {name}"
    named = encode(pipe, text)
    ids = pipe.tokenizer(pipe.maybe_convert_prompt(text, pipe.tokenizer)).input_ids
    toys = [row for row, token in enumerate(ids) if token >= 592]  # the vocabulary has 592 entries without it
    assert len(toys) == 3 * vectors
    assert find_word(name.lower(), named.words, named.tokens) == toys
    assert find_word(name, named.words, named.tokens, 1) == toys[vectors : 2 * vectors]
    cars = [row for row, token in enumerate(pipe.tokenizer.convert_ids_to_tokens(ids)) if token == "car</w>"]
    assert len(cars) == 2 and find_word("car", named.words, named.tokens) == cars


@pytest.fixture
def left(fresh):
    """A pipeline whose tokenizer puts the padding before the text, as Kolors' does."""
    pipe = fresh("sd1")
    pipe.tokenizer.padding_side = "left"
    return pipe


def test_padding_before_the_text(left):
    ids = left.tokenizer("a car and a tree", padding="max_length", max_length=77).input_ids
    padded, short = encode(left, "a car and a tree", padding=True), encode(left, "a car and a tree")
    assert padded.tokens[:-7] == ("<pad>",) * 70 and padded.length == 7
    assert padded.tokens[-7:] == short.tokens == ("<|startoftext|>", "a", "car", "and", "a", *short.tokens[5:])
    (row,) = find_word("car", padded.words, padded.tokens)
    assert left.tokenizer.convert_ids_to_tokens(ids[row]) == "car</w>"
    assert torch.equal(short.values, padded.values[-7:])
    assert torch.equal(short["car"], padded["car"])


def test_a_text_of_other_rows_than_the_context_is_not_named(sd1_pipe):
    """As of a pipeline that reads a long prompt in parts of 77 tokens."""
    named = reader_of(sd1_pipe).named("a car", torch.zeros(154, 24), None, {})
    assert named.tokens[:2] == ("0", "1") and len(named.tokens) == 154
    with pytest.raises(ValueError, match="the text of these 154 rows is unknown"):
        named["car"]


def test_names_that_do_not_fit_their_rows():
    with pytest.raises(ValueError, match=r"2 tokens and embeddings of shape \(3, 4\)"):
        TokenEmbeddings(torch.zeros(3, 4), ("a", "b"))
    with pytest.raises(ValueError, match="are not of its 3 tokens"):
        TokenEmbeddings(torch.zeros(3, 4), ("a", "b", "c"), (Word("c", 2, 4),))


def test_phrases_in_a_list_of_phrases_are_found_in_their_own_place(sd1_pipe):
    named = encode(sd1_pipe, "a person, a person on a car, a car, cars")
    people, cars = (find_word(word, named.words, named.tokens) for word in ("person", "car"))
    assert len(people) % 2 == 0 and len(cars) == 2
    rows = find_phrases(["person", "person on a car", "car", "cars"], named.words, named.tokens)
    assert rows[0] == people[: len(people) // 2] and rows[2] == cars[1:]
    assert rows[1] == list(range(people[len(people) // 2], cars[0] + 1))
    assert rows[3] == find_word("cars", named.words, named.tokens)
    with pytest.raises(ValueError, match="not in the text"):
        find_phrases(["car", "person on a car"], named.words, named.tokens)


def test_a_removed_text_encoder_is_named(fresh):
    pipe = fresh("sd1")
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="has no text encoder .*daam_from"):
        encode(pipe, "a car")
