// A picture to begin with: upright, of a size that is worth sending, without whatever else its file tells.

const LARGEST = 2048; // pixels of the longer side

/** `{name, bitmap, blob, url}` of a file; throws an Error in words where it is no picture. */
export async function begun(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new Error(`${file.name || "The file"} is not a picture that this browser can read.`);
  }
  const scale = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(bitmap.width * scale));
  const height = Math.max(1, Math.round(bitmap.height * scale));
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff"; // under what is transparent, as the server has it; and transparency is a mask's word
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return { name: file.name || "Pasted picture", bitmap: await createImageBitmap(canvas), blob, url: URL.createObjectURL(blob) };
}
