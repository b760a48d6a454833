// The pictures of this visit: one in the middle, all of them in a strip below it.

const MOST = 60; // kept; older ones go
const SMALL = 384; // pixels: what has fewer is shown larger
const COMFORTABLE = 512;

const $ = (id) => document.getElementById(id);

/**
 * One picture on its way: `fields` made it, `blob` is there when it is finished, `preview` meanwhile.
 * `state` is waiting, drawing or done; what is cancelled or fails is taken out.
 */
export class Entry {
  constructor(fields) {
    this.fields = fields;
    this.state = "waiting";
    this.blob = null;
    this.url = null;
    this.share = 0;
    this.step = null;
    this.seconds = 0;
  }

  get over() {
    return this.state === "done";
  }

  show(blob) {
    if (this.url !== null) URL.revokeObjectURL(this.url);
    this.url = blob === null ? null : URL.createObjectURL(blob);
  }
}

export class Gallery {
  constructor() {
    this.entries = [];
    this.current = null;
  }

  /** Put new ones first, and the first of them in the middle. */
  add(entries) {
    this.entries.unshift(...entries);
    for (const old of this.entries.splice(MOST)) old.show(null);
    const items = entries.map((entry) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(document.createElement("img"), document.createElement("i"));
      button.addEventListener("click", () => this.select(entry));
      entry.button = button;
      const item = document.createElement("li");
      item.append(button);
      return item;
    });
    $("strip").prepend(...items);
    while ($("strip").children.length > MOST) $("strip").lastChild.remove();
    $("strip").scrollTo({ left: 0 });
    this.select(entries[0]);
    for (const entry of entries) this.update(entry);
  }

  /** Take one out, as if it had not been asked for. */
  drop(entry) {
    entry.show(null);
    entry.button.parentElement.remove();
    this.entries = this.entries.filter((other) => other !== entry);
    if (this.current === entry) {
      this.current = null;
      if (this.entries.length) this.select(this.entries[0]);
      else this._frame();
    }
  }

  select(entry) {
    this.current = entry;
    for (const other of this.entries) other.button.removeAttribute("aria-current");
    entry.button.setAttribute("aria-current", "true");
    this._frame();
  }

  update(entry) {
    const [image, bar] = entry.button.children;
    const label = [entry.fields.prompt || "without a prompt", `seed ${entry.fields.seed}`, entry.over ? "" : "being drawn"];
    entry.button.setAttribute("aria-label", label.filter(Boolean).join(", "));
    image.hidden = entry.url === null;
    image.alt = "";
    image.classList.toggle("preview", !entry.over);
    if (entry.url !== null && image.src !== entry.url) image.src = entry.url;
    bar.style.transform = `scaleX(${entry.over ? 0 : entry.share})`;
    if (entry === this.current) this._frame();
  }

  _frame() {
    const entry = this.current;
    const picture = $("picture");
    const shown = entry !== null && entry.url !== null;
    const drawing = entry !== null && !entry.over;
    picture.hidden = !shown;
    $("blank").hidden = shown || entry !== null;
    $("caption").hidden = entry === null || !entry.over;
    $("progress").hidden = !drawing;
    $("stage").setAttribute("aria-busy", String(drawing));
    if (shown) {
      if (picture.src !== entry.url) picture.src = entry.url;
      picture.alt = entry.over ? entry.fields.prompt || "A picture without a prompt" : "What there is so far";
      picture.classList.toggle("preview", !entry.over);
      const [width, height] = entry.fields.size.split("x").map(Number);
      const larger = Math.max(width, height);
      const shownWidth = larger < SMALL ? width * Math.max(1, Math.round(COMFORTABLE / larger)) : width;
      picture.style.setProperty("--width", `${shownWidth}px`);
      picture.style.setProperty("--ratio", String(width / height));
    }
    if (drawing) {
      const percent = Math.round(100 * entry.share);
      $("progress").setAttribute("aria-valuenow", String(percent));
      $("bar").style.transform = `scaleX(${entry.share})`;
    }
    $("status").textContent = entry === null ? "" : statusOf(entry);
    if (entry !== null && entry.over) this._caption(entry);
  }

  _caption(entry) {
    const { prompt, seed, size, model } = entry.fields;
    const more = document.createElement("span");
    more.className = "quiet";
    more.textContent = `seed ${seed} · ${size.replace("x", " × ")} · ${model}`;
    $("title").replaceChildren(prompt || "Without a prompt", more);
    $("download").href = entry.url;
    $("download").download = fileName(prompt, seed);
  }
}

function statusOf(entry) {
  if (entry.state === "waiting") return "Waiting for its turn…";
  if (entry.state === "drawing") return entry.step === null ? "Drawing…" : `Drawing, step ${entry.step[0]} of ${entry.step[1]}`;
  return `Finished in ${entry.seconds.toFixed(1)} s.`;
}

function fileName(prompt, seed) {
  const words = prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60);
  return `${words || "picture"}-${seed}.png`;
}
