// Draws a segmentation over its picture, inside Gradio's HTML component: `element` is the component's, `props.value`
// what `shown` in app_answers.py returned, and `watch` calls back when that changes.

let ids = null; // class of every pixel, row by row
let result = null;

const part = (name) => element.querySelector("." + name);

function load(address) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = reject;
    image.src = address;
  });
}

async function show() {
  const value = props.value;
  part("stage").hidden = part("legend").hidden = !value;
  part("nothing").hidden = !!value;
  if (!value) return;
  const [photo, mask] = await Promise.all([load(value.picture), load(value.mask)]);
  if (value !== props.value) return; // another result came meanwhile
  const canvas = part("paint");
  canvas.width = mask.width;
  canvas.height = mask.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(mask, 0, 0);
  const pixels = context.getImageData(0, 0, mask.width, mask.height).data;
  ids = Uint16Array.from({ length: mask.width * mask.height }, (_, i) => pixels[4 * i] + 256 * pixels[4 * i + 1]);
  result = value;
  part("photo").src = value.picture;
  paint();
  list();
}

// Colours of all classes, or of one alone.
function paint(only = null) {
  const canvas = part("paint");
  const context = canvas.getContext("2d");
  const colors = context.createImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(colors.data.buffer); // 0xAABBGGRR
  const table = result.palette.map(([red, green, blue]) => (0xff000000 | (blue << 16) | (green << 8) | red) >>> 0);
  ids.forEach((id, i) => (pixels[i] = only === null || only === id ? table[id] : 0));
  context.putImageData(colors, 0, 0);
}

// The classes that the picture shows, the largest first.
function list() {
  const counts = new Array(result.names.length).fill(0);
  ids.forEach((id) => counts[id]++);
  const seen = [...counts.keys()].filter((id) => counts[id]).sort((a, b) => counts[b] - counts[a]);
  part("legend").replaceChildren(
    ...seen.map((id) => {
      const entry = document.createElement("li");
      const swatch = document.createElement("i");
      swatch.style.background = `rgb(${result.palette[id]})`;
      entry.append(swatch, `${result.names[id]} ${Math.max(1, Math.round((100 * counts[id]) / ids.length))} %`);
      entry.onpointerenter = () => paint(id);
      entry.onpointerleave = () => paint();
      return entry;
    })
  );
}

const stage = part("stage");
stage.addEventListener("pointermove", (event) => {
  const canvas = part("paint");
  const box = canvas.getBoundingClientRect();
  const x = event.clientX - box.left;
  const y = event.clientY - box.top;
  const column = Math.floor((x / box.width) * canvas.width);
  const row = Math.floor((y / box.height) * canvas.height);
  const inside = ids && column >= 0 && row >= 0 && column < canvas.width && row < canvas.height;
  const tip = part("tip");
  tip.hidden = !inside;
  if (!inside) return;
  tip.textContent = result.names[ids[row * canvas.width + column]];
  // To the left of the pointer where there is no room to its right.
  tip.style.left = `${Math.max(0, x + 14 + tip.offsetWidth > box.width ? x - 14 - tip.offsetWidth : x + 14)}px`;
  tip.style.top = `${Math.max(0, y - 34)}px`;
});
stage.addEventListener("pointerleave", () => (part("tip").hidden = true));

watch("value", show);
show();
