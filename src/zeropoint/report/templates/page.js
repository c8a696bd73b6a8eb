// All of this is an addition: without scripts the page is complete, its table in model order.
(function () {
  var table = document.getElementById("table");
  if (table) {
    var heads = Array.from(table.tHead.rows[0].cells), body = table.tBodies[0];
    heads.forEach(function (head, column) {
      var button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.textContent = "";
      head.appendChild(button);
      button.addEventListener("click", function () {
        var up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach(function (h) { h.removeAttribute("aria-sort"); });
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        var value = function (row) { return row.cells[column].dataset.v; };
        Array.from(body.rows).sort(function (a, b) {
          var x = value(a), y = value(b), d = Number(x) - Number(y);
          if (isNaN(d)) d = x.localeCompare(y, "en", { numeric: true });
          return up ? d : -d;
        }).forEach(function (row) { body.appendChild(row); });
      });
    });
  }
  var layers = Array.from(document.querySelectorAll("details.layer"));
  var bar = document.getElementById("all");
  if (bar && layers.length > 1) {
    [["Open all", true], ["Close all", false]].forEach(function (kind) {
      var button = document.createElement("button");
      button.type = "button";
      button.textContent = kind[0];
      button.addEventListener("click", function () {
        layers.forEach(function (layer) { layer.open = kind[1]; });
      });
      bar.appendChild(button);
    });
  }
  // A link to a layer opens it and goes on from there.
  function follow() {
    var target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target || !target.matches("details.layer")) return;
    target.open = true;
    target.scrollIntoView();
    target.querySelector("summary").focus({ preventScroll: true });
  }
  window.addEventListener("hashchange", follow);
  document.addEventListener("click", function (event) {
    var link = event.target.closest && event.target.closest('a[href^="#"]');
    if (link && link.hash === location.hash) setTimeout(follow);
  });
  follow();
})();
