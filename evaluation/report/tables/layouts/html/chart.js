// A metric against tokens or a cost: lines of budgets with intervals, dense arms as levels, quoted rows as crosses.
{
  const plot = document.getElementById("plot");
  const tip = document.getElementById("tip");
  const upwards = document.getElementById("upwards");
  const across = document.getElementById("across");
  const legend = document.getElementById("legend");
  const off = new Set();
  const QUOTED = "quoted";
  const CROSS = "M-4 -4L4 4M-4 4L4 -4";
  const margin = { top: 34, right: 14, bottom: 44, left: 46 };

  options(upwards, page.upwards.map((one) => [one.key, one.title]));
  options(across, page.across.map((one) => [one.key, one.title]));

  const digits = () => page.upwards.find((one) => one.key === upwards.value).digits;
  const looks = (one) => `colour-${one.colour} ${one.variant}`;

  // Round steps of 1, 2 or 5 times a power of ten.
  const ticks = (low, high, count) => {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const found = [];
    for (let number = Math.ceil(low / step); number * step <= high + step * 1e-9; number++) found.push(number * step);
    return found;
  };

  // Every row's own number where there is room for it: nobody measured at the numbers between.
  const apart = (numbers, place, room) => {
    const kept = [];
    for (const number of [...new Set(numbers)].sort((a, b) => b - a)) {
      if (kept.every((other) => Math.abs(place(other) - place(number)) >= room)) kept.push(number);
    }
    return kept;
  };

  const points = () => {
    const measured = page.rows.map((row) => ({ ...row, one: page.series[row.series] }));
    const quoted = page.quoted.map((row) => ({ ...row, one: null }));
    return [...measured, ...quoted]
      .filter((row) => row.upwards[upwards.value] && row.across[across.value])
      .map((row) => {
        const [y, low = null, high = null] = row.upwards[upwards.value];
        return { row, one: row.one, x: row.across[across.value][0], y, low, high };
      });
  };

  const scales = (shown, width, height) => {
    const xs = shown.filter((point) => !(point.one && point.one.level)).map((point) => point.x);
    const ys = shown.flatMap((point) => [point.y, point.low ?? point.y, point.high ?? point.y]);
    const [left, right] = [Math.min(...xs), Math.max(...xs)];
    const pad = (Math.max(...ys) - Math.min(...ys)) * 0.06 || 1;
    const [low, high] = [Math.min(...ys) - pad, Math.max(...ys) + pad];
    // Budgets are halved from one to the next, and so are costs.
    const ratio = (x) => (left > 0 && right > left ? Math.log(x / left) / Math.log(right / left) : 0.5);
    const wide = width - margin.left - margin.right;
    const tall = height - margin.top - margin.bottom;
    return {
      x: (x) => margin.left + wide * (0.06 + 0.88 * ratio(x)),
      y: (y) => margin.top + (tall * (high - y)) / (high - low),
      xs,
      ticks: ticks(low, high, 5),
    };
  };

  const tell = (point, node) => {
    const written = (number) => number.toFixed(digits());
    const interval = point.low === null ? "" : ` [${written(point.low)}, ${written(point.high)}]`;
    const lines = [`${upwards.selectedOptions[0].textContent}: ${written(point.y)}${interval}`];
    if (across.value !== "tokens") lines.push(`${across.value}: ${Number(point.x.toPrecision(4))}`);
    lines.push(tokens(point.row.across.tokens[0]));
    if (point.row.gain && upwards.value.startsWith("relative")) lines.push(`tuning gains ${point.row.gain}`);
    const name = point.one ? named(point.one) : point.row.label;
    node.setAttribute("aria-label", [name, ...lines].join(", "));
    const show = () => {
      tip.replaceChildren(html("b", {}, name), ...lines.flatMap((line) => [line, html("br")]));
      tip.hidden = false;
      const [box, mark] = [plot.getBoundingClientRect(), node.querySelector(".mark").getBoundingClientRect()];
      const left = mark.left - box.left + 14;
      tip.style.left = `${Math.max(0, Math.min(left, box.width - tip.offsetWidth))}px`;
      tip.style.top = `${Math.max(0, mark.top - box.top - tip.offsetHeight - 6)}px`;
    };
    const hide = () => (tip.hidden = true);
    for (const event of ["mouseenter", "focus"]) node.addEventListener(event, show);
    for (const event of ["mouseleave", "blur"]) node.addEventListener(event, hide);
    node.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  };

  const marked = (point, x, scale) => {
    const node = drawn("g", { class: `point ${point.one ? looks(point.one) : QUOTED}`, tabindex: 0, role: "img" });
    if (point.low !== null) {
      const [top, bottom] = [scale.y(point.high), scale.y(point.low)];
      node.append(drawn("path", { class: "bar", d: `M${x} ${top}V${bottom}M${x - 3} ${top}h6M${x - 3} ${bottom}h6` }));
    }
    const d = point.one ? page.shapes[point.one.shape] : CROSS;
    node.append(drawn("path", { class: "mark", d, transform: `translate(${x} ${scale.y(point.y)})` }));
    tell(point, node);
    return node;
  };

  const level = (point, scale, width) => {
    const [y, top, bottom] = [point.y, point.high ?? point.y, point.low ?? point.y].map(scale.y);
    return drawn("g", { class: "dense" },
      drawn("path", { class: "band", d: `M${margin.left} ${top}H${width - margin.right}V${bottom}H${margin.left}Z` }),
      drawn("path", { class: "level", d: `M${margin.left} ${y}H${width - margin.right}` }),
      drawn("text", { class: "name", x: width - margin.right, y: y - 6, "text-anchor": "end" },
        `${named(point.one)} ${point.y.toFixed(digits())}`));
  };

  const axes = (svg, scale, width, height) => {
    const bottom = height - margin.bottom;
    for (const tick of scale.ticks) {
      const y = scale.y(tick);
      if (y > bottom || y < margin.top) continue;
      svg.append(drawn("path", { class: "rule", d: `M${margin.left} ${y}H${width - margin.right}` }),
        drawn("text", { x: margin.left - 8, y: y + 4, "text-anchor": "end" }, String(Number(tick.toPrecision(6)))));
    }
    svg.append(drawn("path", { class: "axis", d: `M${margin.left} ${bottom}H${width - margin.right}` }));
    for (const tick of apart(scale.xs, scale.x, 30)) {
      const x = scale.x(tick);
      svg.append(drawn("path", { class: "axis", d: `M${x} ${bottom}v4` }),
        drawn("text", { x, y: bottom + 18, "text-anchor": "middle" }, String(Number(tick.toPrecision(3)))));
    }
    svg.append(
      drawn("text", { class: "name", x: 0, y: 14 }, upwards.selectedOptions[0].textContent),
      drawn("text", { class: "name", x: width - margin.right, y: height - 6, "text-anchor": "end" },
        across.selectedOptions[0].textContent));
  };

  const draw = () => {
    tip.hidden = true;
    const width = Math.max(280, plot.clientWidth);
    const height = Math.round(Math.min(440, Math.max(280, width * 0.5)));
    const shown = points().filter((point) => !off.has(point.one ? point.row.series : QUOTED));
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-labelledby": "chart-title" });
    plot.replaceChildren(svg);
    if (!shown.length) {
      svg.append(drawn("text", { x: margin.left, y: margin.top + 20 }, "no arm that is shown has both numbers"));
      return;
    }
    const scale = scales(shown, width, height);
    axes(svg, scale, width, height);
    const lines = page.series.map((one, number) => shown.filter((point) => point.one && point.row.series === number));
    const there = lines.filter((line) => line.length && !line[0].one.level);
    const levels = lines.filter((line) => line.length && line[0].one.level).flat();
    levels.forEach((point) => svg.append(level(point, scale, width)));
    there.forEach((line, index) => {
      // Beside one another: intervals at one budget would hide one another.
      const aside = (index - (there.length - 1) / 2) * Math.min(7, 40 / there.length);
      line.sort((a, b) => a.x - b.x);
      const place = (point) => scale.x(point.x) + aside;
      const d = line.map((point) => `${place(point)} ${scale.y(point.y)}`).join("L");
      const group = drawn("g", { class: looks(line[0].one) }, drawn("path", { class: "line", d: `M${d}` }));
      svg.append(group, ...line.map((point) => marked(point, place(point), scale)));
    });
    shown.filter((point) => !point.one).forEach((point) => svg.append(marked(point, scale.x(point.x), scale)));
  };

  const glyph = (one) =>
    drawn("svg", { class: `glyph ${one ? looks(one) : QUOTED}`, viewBox: "-16 -8 32 16", "aria-hidden": "true" },
      one ? drawn("path", { class: one.level ? "level" : "line", d: "M-15 0H15" }) : null,
      one && one.level ? null : drawn("path", { class: "mark", d: one ? page.shapes[one.shape] : CROSS }));

  const entry = (key, one, name) => {
    const label = html("span", { class: "label" }, name);
    const button = html("button", { type: "button", "aria-pressed": "true" }, glyph(one), label);
    button.addEventListener("click", () => {
      if (!off.delete(key)) off.add(key);
      button.setAttribute("aria-pressed", String(!off.has(key)));
      draw();
    });
    return html("li", {}, button);
  };

  legend.append(...page.series.map((one, number) => entry(number, one, named(one))));
  if (page.quoted.length) legend.append(entry(QUOTED, null, "quoted from papers"));
  for (const choice of [upwards, across]) choice.addEventListener("change", draw);
  if (page.upwards.length) {
    new ResizeObserver(draw).observe(plot);
    draw();
  } else {
    document.getElementById("chart").hidden = true;
  }
}
