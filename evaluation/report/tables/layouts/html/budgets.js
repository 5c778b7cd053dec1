// One arm over its budgets: what stays of some pictures, and what is answered.
if (page.examples.length) {
  const [choice, slider, label] = ["series", "budget", "budget-label"].map((id) => document.getElementById(id));
  const steps = document.getElementById("steps");
  const shown = page.rows.filter((row) => page.examples.some((example) => example.arms[row.id]));

  // The dense arm of the same model is the last step of every other.
  const ladder = (number) => {
    const own = shown.filter((row) => row.series === number);
    const dense = shown.filter((row) => page.series[row.series].level && row.model === own[0].model);
    return [...new Set([...own, ...dense])].sort((a, b) => a.kept - b.kept);
  };

  const numbers = [...new Set(shown.map((row) => row.series))];
  const lines = numbers.filter((number) => !page.series[number].level);
  options(choice, (lines.length ? lines : numbers).map((number) => [number, named(page.series[number])]));

  const card = (example, row) => {
    const answered = example.arms[row.id];
    return html("article", { class: "card" }, picture(example, answered),
      html("h3", {}, example.question),
      html("p", { class: "said" }, verdict(answered)),
      html("p", { class: "quiet" }, `right answer: ${example.answer}`));
  };

  const show = () => {
    const row = ladder(Number(choice.value))[Number(slider.value)];
    const headline = page.upwards.find((one) => row.upwards[one.key]);
    const number = headline ? `, ${headline.title}: ${row.upwards[headline.key][0].toFixed(headline.digits)}` : "";
    const told = `${tokens(row.kept)}${page.series[row.series].level ? " (dense)" : ""}${number}`;
    label.textContent = told;
    slider.setAttribute("aria-valuetext", told);
    const asked = page.examples.filter((example) => example.arms[row.id]).slice(0, 12);
    steps.replaceChildren(...asked.map((example) => card(example, row)));
  };

  const restart = () => {
    slider.max = ladder(Number(choice.value)).length - 1;
    slider.value = 0;
    show();
  };

  choice.addEventListener("change", restart);
  slider.addEventListener("input", show);
  restart();
}
