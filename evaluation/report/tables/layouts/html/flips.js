// Questions that one arm answers rightly and another wrongly, with what both kept.
if (page.examples.length) {
  const [before, after, which] = ["before", "after", "which"].map((id) => document.getElementById(id));
  const shown = page.rows.filter((row) => page.examples.some((example) => example.arms[row.id]));
  const choices = shown.map((row) => [row.id, `${named(row)}, ${tokens(row.kept)}`]);
  options(before, choices);
  options(after, choices);

  const change = (example, [from, to] = [before.value, after.value]) =>
    Math.sign(example.arms[to].score - example.arms[from].score);

  // The tuned arm and its twin with the most to look at, if there are two.
  const flips = ([from, to]) =>
    page.examples.filter((one) => one.arms[from] && one.arms[to] && change(one, [from, to])).length;
  const twins = shown.filter((row) => shown.some((other) => other.id === row.twin)).map((row) => [row.twin, row.id]);
  const pairs = twins.length ? twins : [[shown[0].id, (shown[1] ?? shown[0]).id]];
  [before.value, after.value] = pairs.reduce((best, pair) => (flips(pair) > flips(best) ? pair : best));

  const panel = (example, id) =>
    html("figure", {}, picture(example, example.arms[id]),
      html("figcaption", {}, verdict(example.arms[id]),
        html("span", { class: "quiet" }, `${byId.get(id).label}, ${tokens(count(example.arms[id]))}`)));

  const card = (example) => {
    const told = { 1: "gained", 0: "no flip", [-1]: "lost" }[change(example)];
    return html("article", { class: "card" },
      html("h3", {}, example.question),
      html("p", { class: "quiet" }, `right answer: ${example.answer} \u00b7 ${example.task} \u00b7 ${told}`),
      html("div", { class: "panels" },
        html("figure", {}, picture(example), html("figcaption", { class: "quiet" }, "as the model sees it")),
        panel(example, before.value), panel(example, after.value)));
  };

  const show = () => {
    const both = page.examples.filter((example) => example.arms[before.value] && example.arms[after.value]);
    const gained = both.filter((example) => change(example) > 0);
    const lost = both.filter((example) => change(example) < 0);
    const wanted = { gained, lost, flipped: both.filter((example) => change(example) !== 0), all: both }[which.value];
    document.getElementById("flips").textContent =
      `Of these ${both.length} questions ${gained.length} ${gained.length === 1 ? "is" : "are"} gained and ` +
      `${lost.length} lost. They were chosen to be looked at, and are no sample: rates are in the table.`;
    document.getElementById("cards").replaceChildren(...wanted.map(card));
  };

  for (const choice of [before, after, which]) choice.addEventListener("change", show);
  show();
}
