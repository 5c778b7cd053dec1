// One budget at a time, or all of them; without this every budget is there.
const slider = document.getElementById("budget");
if (slider) {
  document.documentElement.dataset.scripted = "";
  const all = document.getElementById("all");
  const told = document.getElementById("told");
  const names = [...document.querySelectorAll("#budgets option")].map((option) => option.label);
  const cells = [...document.querySelectorAll(".cell")].filter((cell) => cell.dataset.column !== "-1");
  const show = () => {
    told.textContent = all.checked ? "all" : names[Number(slider.value)];
    slider.setAttribute("aria-valuetext", names[Number(slider.value)]);
    slider.disabled = all.checked;
    for (const cell of cells) cell.hidden = !all.checked && cell.dataset.column !== slider.value;
  };
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  slider.addEventListener("input", show);
  all.addEventListener("change", show);
  show();
}
