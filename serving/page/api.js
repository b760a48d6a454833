// What the page says to the server: the same API that programs use, and two small endpoints of its own.

const KEY = "calotype-key";

/** Why the server does not do something, in words; `param` names the field, `retryAfter` is in seconds. */
export class Refused extends Error {
  constructor(message, { status = 0, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, param, retryAfter });
  }
}

export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

/** Models, sizes, schedulers and bounds. */
export async function settings() {
  return (await call("ui/settings", { cache: "no-store" })).json();
}

/** The settings that a picture file carries; null where it has none that are known. */
export async function readSettings(blob) {
  const response = await call("ui/read", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ image: await dataUrl(blob) }),
  });
  return (await response.json()).settings;
}

/**
 * Draw one picture.
 *
 * `fields` are those of the API. With `image`, a Blob, it begins with that, and `mask`, another, says where to draw.
 * `seen` is called with a Blob of what there is so far, `stepped` with the steps done and their number.
 * Returns a Blob with the picture's settings in it; throws Refused, or AbortError where `signal` ended it.
 */
export async function draw(fields, { image = null, mask = null, signal, seen, stepped }) {
  const response = await call(image === null ? "v1/images/generations" : "v1/images/edits", {
    method: "POST",
    signal,
    ...(image === null ? asJson(fields) : { body: asForm(fields, image, mask) }),
  });
  const previews = fields.partial_images;
  for await (const { comment, data } of events(response.body)) {
    if (comment !== null) {
      const found = /^step (\d+)\/(\d+)/.exec(comment);
      if (found) stepped(Number(found[1]), Number(found[2]));
      continue;
    }
    if (data === "[DONE]") break;
    const event = JSON.parse(data);
    if (event.error) throw refused(event.error, 0, null);
    const kind = String(event.type).split(".").pop();
    if (kind === "partial_image") {
      seen(blobOf(event.b64_json, event.output_format));
      stepped(event.partial_image_index + 1, previews + 1);
    } else if (kind === "completed") {
      return blobOf(event.b64_json, event.output_format);
    }
  }
  throw new Refused("The connection ended before the picture was finished. Try again.");
}

export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Refused("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "same-origin", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  let body = null;
  try {
    body = await response.json();
  } catch {
    // Not every proxy answers in JSON; the status says enough.
  }
  throw refused(body?.error ?? body, response.status, retryAfter);
}

/** The error as a sentence, and what to do about it. */
function refused(error, status, retryAfter) {
  let message = error?.message ?? error?.detail;
  if (typeof message !== "string") message = status ? `The server answered with ${status}.` : "The picture failed.";
  message = message.charAt(0).toUpperCase() + message.slice(1);
  if (!/[.!?…]$/.test(message)) message += ".";
  if (retryAfter !== null && !/again/.test(message)) message += ` Try again in ${Math.ceil(retryAfter)} s.`;
  return new Refused(message, { status, param: error?.param ?? null, retryAfter });
}

function asJson(fields) {
  return { headers: { "Content-Type": "application/json" }, body: JSON.stringify(fields) };
}

function asForm(fields, image, mask) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    form.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  form.append("image", image, "image.png");
  if (mask !== null) form.append("mask", mask, "mask.png");
  return form;
}

/** Server-sent events: each is `{data}` or `{comment}`, the other is null. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { data: data.join("\n"), comment: null };
          data = [];
        } else if (line.startsWith(":")) {
          yield { data: null, comment: line.slice(1).trim() };
        } else if (line.startsWith("data:")) {
          data.push(line.slice(5).replace(/^ /, ""));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function blobOf(base64, format) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: `image/${format ?? "png"}` });
}
