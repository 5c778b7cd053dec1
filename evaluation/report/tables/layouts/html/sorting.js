// A heading sorts best first, then worst first, then as the table was.
{
  const table = document.getElementById("rows");
  const headings = [...table.querySelectorAll("thead th")];
  const original = [...table.tBodies].map((body) => [...body.rows]);

  const value = (row, number) => {
    const cell = row.cells[number];
    if (number === 0) return cell.textContent.trim();
    return cell.dataset.number === "" ? null : Number(cell.dataset.number);
  };

  const compare = (a, b, number, sign) => {
    const [one, other] = [value(a, number), value(b, number)];
    // What is not there is last, whichever way the rest goes.
    if (one === null || other === null) return (one === null) - (other === null);
    return sign * (number === 0 ? one.localeCompare(other) : one - other);
  };

  const sort = (number) => {
    const heading = headings[number];
    const first = heading.dataset.first ?? "ascending";
    const second = first === "ascending" ? "descending" : "ascending";
    const next = { none: first, [first]: second, [second]: "none" }[heading.getAttribute("aria-sort")];
    headings.forEach((other) => other.setAttribute("aria-sort", "none"));
    heading.setAttribute("aria-sort", next);
    original.forEach((rows, index) => {
      const order = [...rows];
      if (next !== "none") order.sort((a, b) => compare(a, b, number, next === "ascending" ? 1 : -1));
      table.tBodies[index].append(...order);
    });
    const name = heading.textContent.trim();
    document.getElementById("sorted").textContent =
      next === "none" ? "in the table's own order" : `sorted by ${name}, ${next}`;
  };

  headings.forEach((heading, number) => heading.querySelector("button").addEventListener("click", () => sort(number)));
  document.getElementById("columns")?.addEventListener("change", (event) => {
    table.dataset.columns = event.target.value;
  });
}
