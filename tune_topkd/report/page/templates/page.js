"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const look = read("look"), columns = read("data"), charts = read("charts");
  const rowsOf = (name) => {
    const fields = Object.keys(columns[name] || {});
    const length = fields.length ? columns[name][fields[0]].length : 0;
    return Array.from({ length }, (_, i) => Object.fromEntries(fields.map((field) => [field, columns[name][field][i]])));
  };
  const cache = {};
  const rows = (name) => (cache[name] ??= rowsOf(name));

  // --- figures: specs name colours as "@ink"; a scheme says which they are
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coloured = (value, palette) => {
    if (typeof value === "string") return value[0] === "@" && palette[value.slice(1)] ? palette[value.slice(1)] : value;
    if (Array.isArray(value)) return value.map((each) => coloured(each, palette));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, coloured(each, palette)]));
    return value;
  };
  const views = new Map();
  const draw = async (element, scheme) => {
    const { spec, data } = charts[element.dataset.chart];
    const palette = look.palettes[scheme];
    const drawn = coloured(spec, palette);
    drawn.datasets = Object.fromEntries(Object.entries(data).map(([name, key]) => [name, rows(key).map((row) => ({ ...row }))]));
    views.get(element)?.finalize();
    const config = coloured(look.settings, palette);
    if (element.clientWidth < 460) config.legend.columns = 1;
    const options = { actions: false, config, tooltip: { theme: "custom" }, ...spec.usermeta.embedOptions };
    views.set(element, await vegaEmbed(element, drawn, options));
    element.querySelector("svg, canvas").setAttribute("aria-hidden", "true");  // the label of the figure says it
  };
  let drawing = Promise.resolve();
  const drawAll = (scheme) => {
    drawing = drawing.then(async () => {
      for (const element of document.querySelectorAll("[data-chart]")) await draw(element, scheme);
      document.documentElement.dataset.drawn = scheme;
    });
    return drawing;
  };
  const scheme = () => (dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => drawAll(scheme()));
  addEventListener("beforeprint", () => { if (scheme() === "dark") drawAll("light"); });
  addEventListener("afterprint", () => { if (scheme() === "dark") drawAll("dark"); });
  drawAll(scheme());
  window.tuneTopkd = { views };  // for who wants to look at the data of a figure

  for (const button of document.querySelectorAll("[data-save]"))
    button.addEventListener("click", async () => {
      const elements = document.getElementById(button.dataset.save).querySelectorAll("[data-chart]");
      for (const [place, element] of [...elements].entries()) {
        const link = document.createElement("a");
        link.href = URL.createObjectURL(new Blob([await views.get(element).view.toSVG()], { type: "image/svg+xml" }));
        link.download = `${button.dataset.save}${elements.length > 1 ? `-${place + 1}` : ""}.svg`;
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 1000);
      }
    });

  for (const button of document.querySelectorAll(".copy"))
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });

  // --- tables: a heading sorts; numbers by value, without one last
  const compare = (a, b, isDown) => {
    const isNone = (value) => value === null || value === undefined || value === "" || value === "–";
    if (isNone(a) || isNone(b)) return isNone(a) - isNone(b);
    const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
    return isDown ? -order : order;
  };
  const mark = (heads, head) => {
    const isDown = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", isDown ? "descending" : "ascending");
    return isDown;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    const valueOf = (row, place) => {
      const text = row.cells[place].textContent.trim(), number = parseFloat(text.replace("−", "-").replace("+", ""));
      return heads[place].classList.contains("number") && !Number.isNaN(number) ? number : text;
    };
    heads.forEach((head, place) =>
      head.querySelector("button").addEventListener("click", () => {
        const isDown = mark(heads, head);
        const sorted = [...table.tBodies[0].rows].sort((a, b) => compare(valueOf(a, place), valueOf(b, place), isDown));
        table.tBodies[0].append(...sorted);
      }));
  }

  const all = document.getElementById("all");
  if (all) {
    const PAGE = 50;
    const shownColumns = JSON.parse(all.dataset.columns);
    const every = JSON.parse(all.dataset.rows).flatMap(rows);
    for (const row of every)
      row.stage = row.trial.startsWith("repeat-") ? "fresh seeds" : row.trial.startsWith("test-") ? "test set" : /^\d/.test(row.trial) ? "search" : "baselines";
    const textOf = (row, column) => {
      const value = row[column.field];
      if (value === null || value === undefined) return "";
      if (typeof value === "number") return column.digits !== null ? value.toFixed(column.digits) : Number.isInteger(value) ? String(value) : String(+value.toPrecision(4));
      return String(value);
    };
    const find = document.getElementById("find"), stage = document.getElementById("stage"), status = document.getElementById("status");
    const fill = (select, field) => {
      for (const value of new Set(every.map((row) => row[field]))) select.add(new Option(value, value));
    };
    fill(stage, "stage");
    fill(status, "status");
    let shown = PAGE, sorted = every;
    const head = all.tHead.insertRow();
    const show = () => {
      const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      const found = sorted.filter((row) => {
        if ((stage.value && row.stage !== stage.value) || (status.value && row.status !== status.value)) return false;
        const text = words.length ? shownColumns.map((column) => textOf(row, column)).join(" ").toLowerCase() : "";
        return words.every((word) => text.includes(word));
      });
      const body = document.createElement("tbody");
      for (const row of found.slice(0, shown)) {
        const line = body.insertRow();
        if (row.is_best) line.className = "answer";
        shownColumns.forEach((column, place) => {
          const cell = place ? line.insertCell() : line.appendChild(document.createElement("th"));
          if (!place) cell.scope = "row";
          cell.textContent = textOf(row, column);
          if (column.is_number) cell.className = "number";
          if (column.field === "reason") cell.className = "long";
        });
      }
      all.tBodies[0].replaceWith(body);
      const few = Math.min(shown, found.length);
      document.getElementById("count").textContent =
        `${found.length.toLocaleString("en")} of ${every.length.toLocaleString("en")} trainings` + (few < found.length ? `, ${few} shown` : "");
      for (const id of ["more", "every"]) document.getElementById(id).hidden = few >= found.length;
    };
    shownColumns.forEach((column) => {
      const cell = document.createElement("th"), button = document.createElement("button");
      cell.scope = "col";
      cell.setAttribute("aria-sort", "none");
      if (column.is_number) cell.className = "number";
      button.type = "button";
      button.textContent = column.name;
      button.addEventListener("click", () => {
        const isDown = mark([...head.cells], cell);
        sorted = [...every].sort((a, b) => compare(a[column.field], b[column.field], isDown));
        show();
      });
      cell.append(button);
      head.append(cell);
    });
    for (const input of [find, stage, status]) input.addEventListener("input", () => { shown = PAGE; show(); });
    document.getElementById("more").addEventListener("click", () => { shown += 4 * PAGE; show(); });
    document.getElementById("every").addEventListener("click", () => { shown = Infinity; show(); });
    show();
  }

  // --- contents: where the reader is
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries)
      if (entry.isIntersecting) {
        for (const link of links.values()) link.removeAttribute("aria-current");
        links.get(entry.target.id)?.setAttribute("aria-current", "location");
      }
  }, { rootMargin: "0px 0px -75% 0px" });
  for (const id of links.keys()) { const target = document.getElementById(id); if (target) seen.observe(target); }
})();
