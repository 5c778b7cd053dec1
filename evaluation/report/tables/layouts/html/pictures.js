// A picture with the patches that were dropped behind a veil.
function unpacked(answered) {
  const bits = [...answered.kept].map((digit) => parseInt(digit, 16).toString(2).padStart(4, "0")).join("");
  return [...bits.slice(0, answered.grid[0] * answered.grid[1])].map((bit) => bit === "1");
}

// Runs of patches along each row, as one path.
function patches(flags, columns, wanted) {
  let d = "";
  for (let start = 0; start < flags.length; ) {
    const end = Math.min(flags.length, (Math.floor(start / columns) + 1) * columns);
    let stop = start;
    while (stop < end && flags[stop] === flags[start]) stop++;
    const [x, y, length] = [start % columns, Math.floor(start / columns), stop - start];
    if (flags[start] === wanted) d += `M${x} ${y}h${length}v1h${-length}z`;
    start = stop;
  }
  return d;
}

function picture(example, answered = null) {
  const [width, height] = example.size;
  const image = drawn("image", { href: example.picture, width, height, preserveAspectRatio: "none" });
  const name = answered ? `${count(answered)} of ${unpacked(answered).length} visual tokens kept` : "the picture";
  const shape = { class: `picture${width < 160 ? " coarse" : ""}`, viewBox: `0 0 ${width} ${height}` };
  const svg = drawn("svg", { ...shape, role: "img", "aria-label": name }, image);
  if (answered) {
    const [rows, columns] = answered.grid;
    const flags = unpacked(answered);
    const scale = `scale(${width / columns} ${height / rows})`;
    const scaled = drawn("g", { transform: scale, "shape-rendering": "crispEdges" });
    scaled.append(drawn("path", { class: "veil", d: patches(flags, columns, false) }));
    if (flags.includes(false)) scaled.append(drawn("path", { class: "outline", d: patches(flags, columns, true) }));
    svg.append(scaled);
  }
  return svg;
}

const count = (answered) => unpacked(answered).filter(Boolean).length;

// A word and a mark, and a colour as well.
function verdict(answered) {
  const right = answered.score >= 0.5;
  const part = answered.score > 0 && answered.score < 1 ? ` (${Number(answered.score.toFixed(2))})` : "";
  return html("span", { class: right ? "right" : "wrong" },
    html("span", { "aria-hidden": "true" }, right ? "\u2713 " : "\u2717 "),
    html("span", { class: "spoken" }, `${answered.said || "(nothing)"}${part}`),
    html("span", { class: "hidden" }, right ? " right" : " wrong"));
}
