"use strict";
(() => {
  const tip = document.getElementById("tip");
  const rows = () => [...document.querySelectorAll("#runs tbody tr.run")];
  const detailOf = (row) => row.nextElementSibling;

  // --- tooltips -------------------------------------------------------------------------------
  function place(x, y) {
    const box = tip.getBoundingClientRect();
    const left = x + 14 + box.width > innerWidth ? x - 14 - box.width : x + 14;
    const top = y + 14 + box.height > innerHeight ? y - 14 - box.height : y + 14;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, top)}px`;
  }
  function show(element, x, y) {
    tip.textContent = element.dataset.tip;
    tip.hidden = false;
    place(x, y);
  }
  function mark(element, on) {
    const key = element.dataset.setting;
    if (key === undefined) return;
    for (const other of document.querySelectorAll("[data-setting]")) {
      if (other.dataset.setting === key && other.matches("tr, g.point")) other.classList.toggle("marked", on);
    }
  }
  const tipped = (event) => event.target.closest && event.target.closest("[data-tip]");
  document.addEventListener("pointerover", (event) => {
    const element = tipped(event);
    if (!element) return;
    show(element, event.clientX, event.clientY);
    mark(element, true);
  });
  document.addEventListener("pointermove", (event) => { if (!tip.hidden && tipped(event)) place(event.clientX, event.clientY); });
  document.addEventListener("pointerout", (event) => {
    const element = tipped(event);
    if (!element) return;
    tip.hidden = true;
    mark(element, false);
  });
  document.addEventListener("focusin", (event) => {
    const element = tipped(event);
    if (!element || !element.matches(":focus-visible")) return;
    const box = element.getBoundingClientRect();
    show(element, box.left, box.bottom);
    mark(element, true);
  });
  document.addEventListener("focusout", (event) => {
    const element = tipped(event);
    if (!element) return;
    tip.hidden = true;
    mark(element, false);
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

  // --- sorting --------------------------------------------------------------------------------
  function sortBy(table, column, direction) {
    const body = table.tBodies[0];
    const groups = [...body.rows].filter((row) => !row.classList.contains("detail"))
      .map((row) => [row, row.nextElementSibling && row.nextElementSibling.classList.contains("detail") ? row.nextElementSibling : null]);
    const value = (row) => row.cells[column].dataset.v;
    groups.sort(([a], [b]) => {
      const [x, y] = [value(a), value(b)];
      // What is unknown stays at the end in both directions.
      if (x === "" || y === "") return (x === "") - (y === "");
      const [p, q] = [Number(x), Number(y)];
      const order = Number.isNaN(p) || Number.isNaN(q)
        ? x.localeCompare(y, undefined, { numeric: true }) : p - q;
      return direction * order;
    });
    for (const [row, detail] of groups) {
      body.append(row);
      if (detail) body.append(detail);
    }
  }
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const descending = head.getAttribute("aria-sort") === "ascending"
        || (!head.hasAttribute("aria-sort") && head.dataset.first === "descending");
      for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortBy(head.closest("table"), head.cellIndex, descending ? -1 : 1);
    });
  }

  // --- filtering ------------------------------------------------------------------------------
  const search = document.getElementById("search");
  const selects = [...document.querySelectorAll(".tools select")];
  const count = document.getElementById("count");
  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kept = new Set();
    let shown = 0;
    for (const row of rows()) {
      const text = row.dataset.text;
      const keep = words.every((word) => text.includes(word))
        && selects.every((select) => !select.value || row.dataset[select.name] === select.value);
      row.hidden = !keep;
      const detail = detailOf(row);
      if (!keep) detail.hidden = true;
      row.querySelector("button.command").setAttribute("aria-expanded", String(!detail.hidden));
      if (keep) { kept.add(row.dataset.setting); shown += 1; }
    }
    count.textContent = `${shown} of ${rows().length} runs`;
    for (const part of document.querySelectorAll("g.point, path.curve")) {
      part.classList.toggle("dimmed", !kept.has(part.dataset.setting));
    }
  }
  if (search) {
    search.addEventListener("input", filter);
    for (const select of selects) select.addEventListener("change", filter);
    document.getElementById("reset").addEventListener("click", () => {
      search.value = "";
      for (const select of selects) select.value = "";
      filter();
    });
    filter();
  }

  // --- commands -------------------------------------------------------------------------------
  for (const button of document.querySelectorAll("button.command")) {
    button.addEventListener("click", () => {
      const detail = detailOf(button.closest("tr"));
      detail.hidden = !detail.hidden;
      button.setAttribute("aria-expanded", String(!detail.hidden));
    });
  }
})();
