"use strict";
// Text is set as text everywhere: nothing that a model or a file says is read as HTML.
const page = JSON.parse(document.getElementById("data").textContent);

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const html = (name, attributes = {}, ...children) => filled(document.createElement(name), attributes, children);

const drawn = (name, attributes = {}, ...children) =>
  filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

function options(select, choices) {
  select.replaceChildren(...choices.map(([value, title]) => html("option", { value }, title)));
}

const byId = new Map(page.rows.map((row) => [row.id, row]));
const tokens = (count) => `${Number(count.toFixed(1))} visual token${count === 1 ? "" : "s"}`;
const severalModels = new Set(page.rows.map((row) => row.model)).size > 1;
const named = (one) => (severalModels ? `${one.label} (${one.model})` : one.label);

{
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const show = (dark) => {
    root.dataset.theme = dark ? "dark" : "light";
    button.setAttribute("aria-pressed", String(dark));
  };
  show(window.matchMedia("(prefers-color-scheme: dark)").matches);
  button.addEventListener("click", () => show(root.dataset.theme !== "dark"));
}
