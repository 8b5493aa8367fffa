// The view of the annotator: shows the image and the label map, and sends each stroke to Python, which draws it.

const TOOLS = [
  ["brush", "Brush", "b", "Paint with the chosen class."],
  ["eraser", "Eraser", "e", "Paint with unlabeled."],
  ["polygon", "Polygon", "p",
    "Click the corners; double-click, Enter or a click on the first corner closes it, Escape drops it."],
  ["fill", "Fill", "f", "Click a region of one label to give it the chosen class."],
  ["grow", "Grow", "g",
    "Scribble on the object with its class, then beside it with unlabeled (right button): it grows to the edges."],
];
const SCREEN = 560; // CSS pixels of the image's longer side, about

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const css = ([r, g, b], alpha = 1) => `rgba(${r}, ${g}, ${b}, ${alpha})`;

function render({ model, el }) {
  let tool = "brush";
  let value = model.get("classes")[1].id;
  let points = []; // of the stroke or polygon in the making, in image pixels
  let stroke = null; // the button's value while it is down: null, or the id it paints with
  let waiting = []; // strokes that Python has not answered yet
  let pointer = null;
  let image = null;
  const layer = document.createElement("canvas"); // the label map in colours, at the image's size
  const name = `daamlib-${Math.random().toString(36).slice(2)}`; // of this view's radio buttons

  const canvas = element("canvas", { tabIndex: 0, className: "daamlib-canvas" });
  canvas.setAttribute("role", "img");
  const size = range("Brush size", 1, 40, 1, 6);
  const opacity = range("Label opacity", 0, 100, 1, 55);
  const undo = button("Undo", "Take the last stroke back (Ctrl+Z)", () => send({ type: "undo" }));
  const save = button("Save", "Strokes are saved at once; this marks an image with none of the classes as done", () =>
    send({ type: "save" }));
  const previous = button("Previous", "The image before (left arrow)", () => go(-1));
  const next = button("Next", "The next image (right arrow)", () => go(1));
  const place = element("strong");
  const progress = element("progress");
  const progressText = element("span");
  const status = element("output", { className: "daamlib-status" });
  status.setAttribute("role", "status");
  const hint = element("p", { className: "daamlib-hint" });

  const kinds = TOOLS.map(([key, label, letter, title]) => ({ key, label, title: `${title} (${letter})` }));
  const tools = radios("Tool", kinds, tool, chooseTool);
  const things = model.get("classes").map(({ id, name, color }) => ({ key: id, label: name, color }));
  const classes = radios("Class", things, value, chooseClass);

  const root = element("div", { className: "daamlib-annotator", tabIndex: -1 },
    element("div", { className: "daamlib-bar" }, previous, next, place, progress, progressText),
    element("div", { className: "daamlib-body" }, canvas,
      element("div", { className: "daamlib-side" }, tools.box, hint, classes.box, size.box, opacity.box,
        element("div", { className: "daamlib-bar" }, undo, save), status)));
  // JupyterLab's own letters would run and delete cells; it looks at what has the focus, not further up
  for (const one of [root, ...root.querySelectorAll("canvas, button, input")]) one.dataset.lmSuppressShortcuts = "true";
  el.append(root);

  // -- controls -------------------------------------------------------------------------------------------------

  function button(text, title, act) {
    return element("button", { type: "button", textContent: text, title, onclick: act });
  }

  function range(text, min, max, step, start) {
    const input = element("input", { type: "range", min, max, step, value: start, oninput: () => draw() });
    const label = element("label", { className: "daamlib-range" }, element("span", { textContent: text }), input);
    return { input, box: label };
  }

  function radios(legend, choices, chosen, choose) {
    const inputs = new Map();
    const labels = choices.map(({ key, label, title = "", color }) => {
      const input = element("input", { type: "radio", name: `${name}-${legend}`, value: key, checked: key === chosen });
      input.onchange = () => choose(key);
      inputs.set(key, input);
      const parts = [input];
      if (color) {
        const swatch = element("span", { className: "daamlib-swatch" });
        swatch.style.background = css(color);
        parts.push(swatch);
      }
      return element("label", { title }, ...parts, label);
    });
    return { inputs, box: element("fieldset", {}, element("legend", { textContent: legend }), ...labels) };
  }

  function chooseTool(key) {
    tool = key;
    tools.inputs.get(key).checked = true;
    hint.textContent = TOOLS.find(([known]) => known === key)[3];
    points = [];
    draw();
  }

  function chooseClass(key) {
    value = key;
    classes.inputs.get(key).checked = true;
    draw();
  }

  function go(step) {
    points = [];
    send({ type: "go", position: model.get("position") + step });
  }

  function send(action) {
    status.className = "daamlib-status";
    status.textContent = "saving …"; // stays where the kernel does not answer
    model.send(action);
  }

  // -- drawing --------------------------------------------------------------------------------------------------

  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * model.get("width"),
      ((event.clientY - box.top) / box.height) * model.get("height"),
    ];
  };
  // in image pixels; the slider counts those of an image of 128, and more for a larger one, which looks no larger
  const coarse = () => Math.max(128, model.get("width"), model.get("height")) / 128;
  const radius = () => (Number(size.input.value) / 2) * coarse();
  const painted = (event) => (tool === "eraser" || event.button === 2 || event.shiftKey ? 0 : value);

  canvas.oncontextmenu = (event) => event.preventDefault(); // the right button paints unlabeled
  canvas.dataset.jpSuppressContextMenu = "true"; // JupyterLab has a menu of its own
  canvas.onpointerdown = (event) => {
    if (event.button !== 0 && event.button !== 2) return;
    event.preventDefault();
    canvas.focus({ preventScroll: true });
    const point = at(event);
    if (tool === "polygon") {
      const near = points.length > 2 && Math.hypot(point[0] - points[0][0], point[1] - points[0][1]) < 8 * pixel();
      if (near) close(painted(event));
      else points.push(point);
      draw();
    } else if (tool === "fill") {
      send({ type: "fill", points: [point], value: painted(event) });
    } else {
      canvas.setPointerCapture(event.pointerId);
      stroke = painted(event);
      points = [point];
      draw();
    }
  };
  canvas.onpointermove = (event) => {
    pointer = at(event);
    if (stroke !== null) points.push(...(event.getCoalescedEvents?.() ?? [event]).map(at));
    draw();
  };
  canvas.onpointerup = () => {
    if (stroke === null) return;
    const action = { type: tool === "grow" ? "grow" : "brush", points, radius: radius(), value: stroke };
    waiting.push(action);
    stroke = null;
    points = [];
    send(action);
    draw();
  };
  canvas.onpointercancel = () => { stroke = null; points = []; draw(); };
  canvas.onpointerleave = () => { pointer = null; draw(); };
  canvas.ondblclick = (event) => { if (tool === "polygon") close(painted(event)); };

  function close(id) {
    // the second click of a double click has added the same corner again
    const apart = ([x, y], [u, v]) => Math.hypot(x - u, y - v) > pixel();
    const corners = points.filter((point, i) => !i || apart(point, points[i - 1]));
    if (corners.length > 2) send({ type: "polygon", points: corners, value: id });
    points = [];
    draw();
  }

  root.onkeydown = (event) => {
    if (event.altKey || event.target.type === "range") return;
    const key = event.key.toLowerCase();
    const known = TOOLS.find(([, , letter]) => letter === key);
    const digit = model.get("classes")[Number(key)];
    if (event.ctrlKey || event.metaKey) {
      if (key !== "z") return;
      undo.click();
    } else if (event.target.type === "radio" && key.startsWith("arrow")) return; // it moves among them
    else if (known) chooseTool(known[0]);
    else if (/^\d$/.test(key) && digit) chooseClass(digit.id);
    else if (key === "[" || key === "]") {
      size.input.value = Number(size.input.value) + (key === "]" ? 1 : -1);
      draw();
    } else if (key === "arrowleft" && !previous.disabled) go(-1);
    else if (key === "arrowright" && !next.disabled) go(1);
    else if (key === "enter" && tool === "polygon" && points.length) close(value);
    else if (key === "escape") { points = []; stroke = null; draw(); }
    else return;
    event.preventDefault();
    event.stopPropagation();
  };

  // -- pictures -------------------------------------------------------------------------------------------------

  const pixel = () => model.get("width") / canvas.getBoundingClientRect().width; // image pixels of a screen's

  function colourLabels() {
    const [w, h] = [model.get("width"), model.get("height")];
    const data = model.get("labels");
    const ids = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    const palette = model.get("palette");
    Object.assign(layer, { width: w, height: h });
    const context = layer.getContext("2d");
    const pixels = context.createImageData(w, h);
    ids.forEach((id, i) => { if (id) pixels.data.set([...palette[id], 255], 4 * i); }); // 0, unlabeled, stays clear
    context.putImageData(pixels, 0, 0);
  }

  function trace(context, scale, line, fill) {
    context.beginPath();
    line.forEach(([x, y]) => context.lineTo(x * scale, y * scale));
    if (line.length === 1) context.lineTo(line[0][0] * scale + 0.01, line[0][1] * scale);
    fill ? context.fill() : context.stroke();
  }

  function draw() {
    if (!image) return;
    const scale = canvas.width / model.get("width");
    const context = canvas.getContext("2d");
    const colour = (id) => css(id ? model.get("palette")[id] : [255, 255, 255], 0.6);
    context.imageSmoothingEnabled = false;
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    context.globalAlpha = Number(opacity.input.value) / 100;
    context.drawImage(layer, 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
    context.lineCap = context.lineJoin = "round";
    const current = stroke === null ? [] : [{ points, radius: radius(), value: stroke }];
    for (const one of [...waiting, ...current]) {
      Object.assign(context, { strokeStyle: colour(one.value), lineWidth: 2 * one.radius * scale });
      trace(context, scale, one.points, false);
    }
    if (tool === "polygon" && points.length) {
      context.fillStyle = colour(value);
      const open = pointer ? [...points, pointer] : points;
      trace(context, scale, open, true);
      for (const [style, width] of [["black", 3], ["white", 1.5]]) {
        Object.assign(context, { strokeStyle: style, lineWidth: width });
        trace(context, scale, open, false);
      }
    } else if (pointer && ["brush", "eraser", "grow"].includes(tool)) {
      for (const [style, width] of [["black", 3], ["white", 1.5]]) {
        Object.assign(context, { strokeStyle: style, lineWidth: width });
        context.beginPath();
        context.arc(pointer[0] * scale, pointer[1] * scale, radius() * scale, 0, 2 * Math.PI);
        context.stroke();
      }
    }
  }

  function showPicture() {
    const [w, h] = [model.get("width"), model.get("height")];
    const scale = Math.max(1, Math.round(SCREEN / Math.max(w, h)));
    Object.assign(canvas, { width: w * scale, height: h * scale });
    canvas.style.maxWidth = `${Math.max(SCREEN, w * scale)}px`;
    const address = URL.createObjectURL(new Blob([model.get("picture")], { type: "image/png" }));
    const loading = new Image();
    loading.onload = () => { image = loading; URL.revokeObjectURL(address); draw(); };
    loading.src = address;
  }

  function show() {
    const [position, count, done] = ["position", "count", "done"].map((key) => model.get(key));
    previous.disabled = position === 0;
    next.disabled = position === count - 1;
    undo.disabled = !model.get("can_undo");
    place.textContent = `Image ${position + 1}`;
    Object.assign(progress, { max: count, value: done });
    progress.setAttribute("aria-label", "labelled images");
    progressText.textContent = `${done} of ${count} labelled`;
    canvas.setAttribute("aria-label", `image ${position + 1} with its label map, to draw on`);
    status.textContent = model.get("status");
    status.className = `daamlib-status${model.get("failed") ? " daamlib-failed" : ""}`;
    waiting = [];
    colourLabels();
    draw();
  }

  model.on("change:picture", showPicture);
  model.on("change:revision", show);
  chooseTool(tool);
  show();
  showPicture();
  return () => {
    model.off("change:picture", showPicture);
    model.off("change:revision", show);
  };
}

export default { render };
