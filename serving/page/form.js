// The settings: what the server offers becomes fields, and fields become what is asked for.

const $ = (id) => document.getElementById(id);
const OWN = "own"; // sizes that are typed in
const SEEDS = 2 ** 32;

export class Form {
  /** `bounds` is what the server's settings say. */
  constructor() {
    this.models = [];
    $("size").addEventListener("change", () => this._size());
    $("model").addEventListener("change", () => this.defaults());
    $("defaults").addEventListener("click", () => this.defaults());
    $("loras").addEventListener("change", () => this._lora());
    $("any-seed").addEventListener("click", () => this.seed(null));
    for (const [id, out, words] of RANGES) {
      $(id).addEventListener("input", () => ($(out).textContent = words($(id).value)));
    }
  }

  offer(settings) {
    const first = this.models.length === 0;
    this.models = settings.models;
    this.bounds = settings.bounds;
    const chosen = $("model").value;
    $("model").replaceChildren(...settings.models.map(({ name }) => new Option(name, name)));
    if (settings.models.some(({ name }) => name === chosen)) $("model").value = chosen;
    $("model-field").hidden = settings.models.length < 2;
    $("scheduler").replaceChildren(new Option("The model’s own", ""), ...settings.schedulers.map((name) => new Option(name, name)));
    if (!first) return;
    const most = Math.min(4, settings.bounds.pictures);
    $("counts").replaceChildren(...Array.from({ length: most }, (_, index) => choice("n", index + 1, index === 0)));
    this.defaults();
  }

  get model() {
    return this.models.find(({ name }) => name === $("model").value) ?? this.models[0];
  }

  /** The chosen model's own settings. */
  defaults() {
    const { sizes, steps, guidance } = this.model;
    $("size").replaceChildren(...sizes.map(option), new Option("Another…", OWN));
    if (this.source) this._asPicture();
    const most = Math.min(this.bounds.steps, Math.max(60, 2 * steps));
    setRange("num_inference_steps", steps, most);
    setRange("guidance_scale", guidance, Math.max(15, guidance));
    $("scheduler").value = "";
    $("loras").replaceChildren(new Option("None", ""), ...this.model.loras.map((name) => new Option(name, name)));
    $("lora-field").hidden = this.model.loras.length === 0;
    setRange("lora-scale", 1);
    this._lora();
    this._size();
  }

  /** With a picture to begin with, of that size in pixels, or without. */
  begin(source) {
    this.source = source;
    const own = $("size").querySelector("[data-own]");
    own?.remove();
    if (source !== null) this._asPicture();
    $("strength-field").hidden = source === null;
    setRange("strength", $("strength").value);
    setRange("feather", $("feather").value);
    this._size();
  }

  _asPicture() {
    const { downscale, sizes } = this.model;
    const [width, height] = [this.source.width, this.source.height].map((side) => Math.floor(side / downscale) * downscale);
    const most = Math.max(...sizes.flatMap((size) => [size.width, size.height]));
    if (Math.min(width, height) < downscale || width * height > this.bounds.pixels) return;
    const own = option({ width, height, label: "As the picture" });
    own.dataset.own = "";
    $("size").prepend(own);
    if (Math.max(width, height) <= most) own.selected = true;
  }

  /** What is asked for, but the number of pictures; throws Unfit where a field cannot be right. */
  fields() {
    const fields = {
      model: this.model.name,
      prompt: $("prompt").value.trim(),
      size: this._chosenSize(),
      num_inference_steps: Number($("num_inference_steps").value),
      guidance_scale: Number($("guidance_scale").value),
    };
    const negative = $("negative_prompt").value.trim();
    if (negative) fields.negative_prompt = negative;
    if ($("loras").value) fields.loras = [{ name: $("loras").value, scale: Number($("lora-scale").value) }];
    if ($("scheduler").value) fields.scheduler = $("scheduler").value;
    return fields;
  }

  get count() {
    return Number(document.querySelector("[name=n]:checked").value);
  }

  /** Seeds of `count` pictures: they follow each other; without one, any. */
  seeds(count) {
    const text = $("seed").value.trim();
    if (text !== "" && !/^\d{1,16}$/.test(text)) throw new Unfit("seed", "A seed is a whole number. Leave it empty for any.");
    const first = text === "" ? crypto.getRandomValues(new Uint32Array(1))[0] % (SEEDS - count) : Number(text);
    if (!Number.isSafeInteger(first + count)) throw new Unfit("seed", "That seed is too large. Leave it empty for any.");
    return Array.from({ length: count }, (_, index) => first + index);
  }

  seed(value) {
    $("seed").value = value ?? "";
  }

  /** Take over what a picture's file says; fields that it does not say stay. */
  use(found) {
    if (found.model && this.models.some(({ name }) => name === found.model)) {
      $("model").value = found.model;
      this.defaults();
    }
    $("prompt").value = found.prompt ?? "";
    $("negative_prompt").value = found.negative_prompt ?? "";
    $("without").open = Boolean(found.negative_prompt);
    if (found.seed !== null) this.seed(found.seed);
    if (found.steps !== null) setRange("num_inference_steps", found.steps, this.bounds.steps);
    if (found.guidance_scale !== null) setRange("guidance_scale", found.guidance_scale);
    $("scheduler").value = found.scheduler ?? "";
    $("more").open = true;
    if (found.width !== null) {
      const value = `${found.width}x${found.height}`;
      const listed = [...$("size").options].some((own) => own.value === value);
      $("size").value = listed ? value : OWN;
      $("width").value = found.width;
      $("height").value = found.height;
      this._size();
    }
  }

  /** Show which field is wrong, by the API's name of it. */
  wrong(name) {
    for (const field of document.querySelectorAll("[aria-invalid]")) {
      field.removeAttribute("aria-invalid");
      field.removeAttribute("aria-describedby");
    }
    const field = name && document.querySelector(`[name="${CSS.escape(name)}"]`);
    if (!field) return;
    field.closest("details")?.setAttribute("open", "");
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-describedby", "error");
    field.focus();
  }

  _chosenSize() {
    if ($("size").value !== OWN) return $("size").value;
    const { downscale } = this.model;
    for (const side of ["width", "height"]) {
      const value = Number($(side).value);
      if (!Number.isInteger(value) || value < downscale || value % downscale) {
        const label = side === "width" ? "The width" : "The height";
        throw new Unfit(side, `${label} is a whole number of pixels that ${downscale} divides.`);
      }
    }
    return `${Number($("width").value)}x${Number($("height").value)}`;
  }

  _lora() {
    $("lora-scale-field").hidden = $("loras").value === "";
  }

  _size() {
    const own = $("size").value === OWN;
    const { sizes, downscale } = this.model;
    $("own-size").hidden = !own;
    for (const side of ["width", "height"]) {
      $(side).step = $(side).min = downscale;
      if (own && !$(side).value) $(side).value = sizes[0][side];
    }
  }
}

/** A field that cannot be right, before anybody is asked. */
export class Unfit extends Error {
  constructor(param, message) {
    super(message);
    this.param = param;
  }
}

const RANGES = [
  ["num_inference_steps", "steps-out", (value) => value],
  ["guidance_scale", "guidance-out", (value) => (Number(value) <= 1 ? "off" : value)],
  ["lora-scale", "lora-scale-out", (value) => value],
  ["strength", "strength-out", (value) => `${Math.round(100 * value)} %`],
  ["feather", "feather-out", (value) => `${value} px`],
];

function setRange(id, value, most = null) {
  const range = $(id);
  if (most !== null) range.max = most;
  range.max = Math.max(Number(range.max), Number(value));
  if (id === "guidance_scale") range.step = Number.isInteger(2 * value) ? "0.5" : "any";
  range.value = value;
  range.dispatchEvent(new Event("input"));
}

function option({ width, height, label }) {
  return new Option(`${label}, ${width} × ${height}`, `${width}x${height}`);
}

function choice(name, value, checked) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name, value, checked });
  const span = document.createElement("span");
  span.textContent = value;
  label.append(input, span);
  return label;
}
