// The packed models, run here. What is in `data.live`: bnncore/report/live.py.
const live = data.live;

// A model: run(image, members) gives the class, the scores, and what the last member alone gives.
async function load(name) {
  const bytes = Uint8Array.from(atob(live.models[name].module), (c) => c.charCodeAt(0));
  const { exports: m } = (await WebAssembly.instantiate(bytes)).instance;
  const floats = (at) => Array.from(new Float32Array(m.memory.buffer, at, live.classes.length));
  return { members: live.models[name].members, run(image, members) {
    new Uint8Array(m.memory.buffer, m.image(), image.length).set(image);
    const label = m.scores(members);
    return { label, scores: floats(m.out()), own: floats(m.outputs()) };
  } };
}
const loaded = {};
const model = (name) => loaded[name] ??= load(name);

if (live?.why) section("Try the models", live.why);
if (live?.models) (function panel() {
  const [height, width, channels] = live.image, size = height * width * channels, names = live.classes;
  const pixels = Uint8Array.from(atob(live.pixels), (c) => c.charCodeAt(0));
  const samples = live.labels.map((label, i) => ({ label, image: pixels.subarray(i * size, (i + 1) * size) }));
  const place = section("Try the models", "The packed models run in this page, by the same C code as on a microcontroller. Take a test image"
    + (channels === 1 && Math.max(height, width) <= 32 ? " or draw one" : "") + ", and ask more or fewer members." + (live.without?.length ? ` Too large for a page: ${live.without.join(", ")}.` : ""));
  const sharp = (image, canvas) => {
    const shown = new ImageData(width, height);
    for (let p = 0; p < width * height; p++) for (let c = 0; c < 4; c++) shown.data[4 * p + c] = c === 3 ? 255 : image[p * channels + (channels === 3 ? c : 0)];
    canvas.width = width;
    canvas.height = height;
    canvas.getContext("2d").putImageData(shown, 0, 0);
    return canvas;
  };
  const rows = data.results.filter((r) => live.models[r.name]).sort((a, b) => (b.kind === "ensemble") - (a.kind === "ensemble") || choice(b) - choice(a));
  const name = choose(place, "model", rows.map((r) => [r.name, r.name]), () => changed());
  const bar = place.querySelector(".choose") ?? place.appendChild(html("div", { class: "choose" }));
  const slider = html("input", { type: "range", min: 1, max: 1, value: 1, id: "members" }), count = html("output", { for: "members" });
  const members = html("label", {}, "members ", slider, " ", count);
  bar.append(members);
  slider.addEventListener("input", () => show());

  const picks = html("fieldset", { class: "samples" }, html("legend", { class: "soft" }, "test images; a cross marks those that this model gets wrong"));
  samples.forEach((s, i) => {
    const box = html("input", { type: "radio", name: "sample", "aria-label": `test image ${i + 1}: ${names[s.label]}` });
    s.mark = html("label", { title: names[s.label] }, box, sharp(s.image, html("canvas", { "aria-hidden": "true" })));
    box.addEventListener("change", () => take(s.image, s.label));
    picks.append(s.mark);
  });
  const view = html("canvas", { role: "img", class: "view" }), bars = html("div", { class: "bars", role: "list", "aria-label": "scores" });
  const said = html("p", { role: "status" }), votes = html("p", { class: "soft" }), time = html("p", { class: "soft" });
  const seen = html("div", {}, html("p", { class: "soft" }, "what the model sees"), view);
  place.append(picks, html("div", { class: "try" }, seen, html("div", {}, said, bars, votes, time)));

  let image = samples[0].image, truth = samples[0].label;
  function take(pixels, label) {
    image = pixels;
    truth = label;
    if (label === null) for (const box of picks.querySelectorAll(":checked")) box.checked = false;
    show();
  }
  async function changed() {
    const { members: most } = await model(name());
    slider.max = most;
    slider.value = most;
    members.hidden = most < 2;
    await show();
  }
  let turn = 0;
  async function show() {
    const now = ++turn;
    place.ariaBusy = "true";
    const m = await model(name()), asked = +slider.value;
    if (now !== turn) return;
    const { label, scores } = m.run(image, asked);
    const order = names.map((_, c) => c).sort((a, b) => scores[b] - scores[a]);
    count.textContent = `${asked} of ${m.members}`;
    sharp(image, view).setAttribute("aria-label", truth === null ? "the drawing" : `a test image: ${names[truth]}`);
    const second = order.find((c) => c !== label);
    said.replaceChildren(html("b", {}, names[label]), truth === null ? "" : label === truth ? ", right" : `, wrong: it is ${names[truth]}`,
      given(second) ? `. It leads ${names[second]} by ${number(scores[label] - scores[second], 2)}.` : "");
    const most = Math.max(...scores, 0), least = Math.min(...scores, 0), share = (v) => 100 * (v - least) / (most - least || 1);
    const few = names.length <= 20 ? names.map((_, c) => c) : [...new Set([...order.slice(0, 10), ...(truth === null ? [] : [truth])])];
    bars.replaceChildren(...few.map((c) => html("div", { role: "listitem", class: [c === label && "best", c === truth && "true", c === label && truth !== null && c !== truth && "wrong"].filter(Boolean).join(" ") },
      html("span", {}, names[c] + (c === truth ? " \u2713" : "")),
      html("i", { style: `--from: ${share(Math.min(scores[c], 0))}%; --to: ${100 - share(Math.max(scores[c], 0))}%` }), html("span", {}, number(scores[c], 2)))));
    const own = m.members < 2 ? [] : Array.from({ length: asked }, (_, k) => m.run(image, k + 1).own).map((z) => names[z.indexOf(Math.max(...z))]);
    votes.textContent = own.length ? `Member by member: ${own.join(", ")}.` : "";
    mark(m, asked, now);
  }
  // All test images; a browser that has run them runs what it has made fast.
  async function mark(m, asked, now) {
    let since = performance.now();
    for (const s of samples) {
      s.mark.classList.toggle("wrong", m.run(s.image, asked).label !== s.label);
      if (performance.now() - since < 12) continue;
      await new Promise(requestAnimationFrame);
      if (now !== turn) return;
      since = performance.now();
    }
    const start = performance.now();
    let runs = 0, spent = 0;
    while (spent < 20) { m.run(image, asked); runs++; spent = performance.now() - start; }
    time.textContent = `${number(spent / runs, 3)} ms an image in this browser, on one thread.`;
    place.ariaBusy = "false";
  }
  if (channels === 1 && Math.max(height, width) <= 32) seen.after(drawing(take, samples.map((s) => s.image), height, width));
  picks.querySelector("input").checked = true;
  changed().catch((error) => { said.textContent = `This browser does not run WebAssembly: ${error.message}`; });
})();

// A place to draw on. What is drawn is moved and scaled to where the data's figures lie, and as dark as they.
function drawing(take, images, height, width) {
  const SIDE = 224, FINE = 16, fit = SIDE / Math.max(height, width);
  const canvas = () => Object.assign(document.createElement("canvas"), { width: width * fit, height: height * fit });
  const pad = canvas(), ink = canvas(), pen = ink.getContext("2d", { willReadFrequently: true });
  for (const [k, v] of Object.entries({ class: "pad", tabindex: 0, role: "application", "aria-label": "Draw here. By keys: arrows move the pen, space puts it down or lifts it, escape clears." })) pad.setAttribute(k, v);
  const edge = [], all = images.flatMap((image) => Array.from(image));
  for (const image of images) for (let p = 0; p < image.length; p++) if (p < width || p >= image.length - width || p % width === 0 || p % width === width - 1) edge.push(image[p]);
  const low = all.reduce((a, b) => Math.min(a, b)), high = all.reduce((a, b) => Math.max(a, b));
  const light = edge.reduce((a, b) => a + b) / edge.length > (low + high) / 2, paper = light ? high : low, full = light ? low : high;
  // [left, top, right, bottom] of what `inked` says, null of nothing.
  function box(w, h, inked) {
    const at = [w, h, 0, 0];
    for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) if (inked(y * w + x)) {
      at[0] = Math.min(at[0], x); at[1] = Math.min(at[1], y); at[2] = Math.max(at[2], x + 1); at[3] = Math.max(at[3], y + 1);
    }
    return at[2] ? at : null;
  }
  const boxes = images.map((image) => box(width, height, (p) => Math.abs(image[p] - paper) > (high - low) / 3)).filter(Boolean);
  const mean = (f) => boxes.reduce((a, b) => a + f(b), 0) / (boxes.length || 1);
  const usual = { side: mean((b) => Math.max(b[2] - b[0], b[3] - b[1])), x: mean((b) => (b[0] + b[2]) / 2), y: mean((b) => (b[1] + b[3]) / 2) };
  const style = (c) => Object.assign(c, { lineWidth: SIDE / 9, lineCap: "round", lineJoin: "round" });
  let at = [pad.width / 2, pad.height / 2], down = false, keys = false;

  function show() {
    const c = pad.getContext("2d"), grey = (v) => `rgb(${v} ${v} ${v})`;
    c.globalCompositeOperation = "copy";
    c.drawImage(ink, 0, 0);
    c.globalCompositeOperation = "source-in";
    c.fillStyle = grey(full);
    c.fillRect(0, 0, pad.width, pad.height);
    c.globalCompositeOperation = "destination-over";
    c.fillStyle = grey(paper);
    c.fillRect(0, 0, pad.width, pad.height);
    c.globalCompositeOperation = "source-over";
    if (!keys) return;
    c.strokeStyle = "#d55e00";
    c.lineWidth = down ? 5 : 2;
    c.beginPath();
    c.arc(at[0], at[1], SIDE / 18, 0, 7);
    c.stroke();
  }
  function line(to) {
    style(pen).beginPath();
    pen.moveTo(...at);
    pen.lineTo(...to);
    pen.stroke();
    at = to;
    show();
    give();
  }
  function clear() {
    pen.clearRect(0, 0, ink.width, ink.height);
    show();
  }
  function give() {
    const alpha = pen.getImageData(0, 0, ink.width, ink.height).data;
    const b = box(ink.width, ink.height, (p) => alpha[4 * p + 3] > 127);
    if (!b) return;
    const scale = FINE * Math.min(usual.side / Math.max(b[2] - b[0], b[3] - b[1]), width / (b[2] - b[0]), height / (b[3] - b[1]));
    const w = (b[2] - b[0]) * scale, h = (b[3] - b[1]) * scale, inside = (v, most) => Math.max(0, Math.min(v, most));
    const fine = Object.assign(document.createElement("canvas"), { width: width * FINE, height: height * FINE }), c = fine.getContext("2d");
    c.drawImage(ink, b[0], b[1], b[2] - b[0], b[3] - b[1], inside(usual.x * FINE - w / 2, fine.width - w), inside(usual.y * FINE - h / 2, fine.height - h), w, h);
    const { data: dots } = c.getImageData(0, 0, fine.width, fine.height), sums = new Float64Array(width * height);
    for (let p = 0; p < fine.width * fine.height; p++)
      sums[Math.floor(Math.floor(p / fine.width) / FINE) * width + Math.floor(p % fine.width / FINE)] += dots[4 * p + 3];
    take(Uint8Array.from(sums, (s) => Math.round(paper + (full - paper) * s / (255 * FINE * FINE))), null);
  }
  const where = (e) => [(e.offsetX + .01) * pad.width / pad.clientWidth, e.offsetY * pad.height / pad.clientHeight];
  pad.addEventListener("pointerdown", (e) => { keys = down = false; pad.setPointerCapture(e.pointerId); at = where(e); line(where(e)); });
  pad.addEventListener("pointermove", (e) => { if (e.buttons) line(where(e)); });
  pad.addEventListener("blur", () => { keys = down = false; show(); });
  pad.addEventListener("keydown", (e) => {
    const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key] ?? [0, 0], step = SIDE / 16;
    if (e.key === "Escape") clear();
    if (!x && !y && e.key !== " ") return;
    e.preventDefault();
    keys = true;
    if (e.key === " ") down = !down;
    const to = [Math.max(0, Math.min(at[0] + step * x, pad.width)), Math.max(0, Math.min(at[1] + step * y, pad.height))];
    if (down) line(to); else { at = to; show(); }
  });
  const button = html("button", { type: "button" }, "clear the drawing");
  button.addEventListener("click", clear);
  clear();
  return html("div", {}, html("p", { class: "soft" }, "draw here"), pad, html("p", {}, button));
}
