// Keeps the page up to date: when the server says that there is something new, the page asks for itself
// and takes over what has changed in the elements with data-live. Elements stay, and with them the focus.
"use strict";
(() => {
  const status = document.getElementById("live-status");
  const button = document.getElementById("live-toggle");
  let source = null, asking = false, again = false, paused = false;

  const say = (text) => { if (status.textContent !== text) status.textContent = text; };

  const keyOf = (node) => node.nodeType === Node.ELEMENT_NODE ? node.getAttribute("data-key") : null;

  // become makes an element equal to another one of a document that was asked for.
  const become = (old, now) => {
    for (const { name } of [...old.attributes]) if (!now.hasAttribute(name)) old.removeAttribute(name);
    for (const { name, value } of now.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    const keyed = new Map();
    for (const child of old.childNodes) if (keyOf(child) !== null) keyed.set(keyOf(child), child);
    let place = old.firstChild;
    for (const next of [...now.childNodes]) {
      const key = keyOf(next);
      let have = key !== null ? keyed.get(key) : place;
      if (have && (have.nodeName !== next.nodeName || (key === null && keyOf(have) !== null))) have = null;
      if (!have) {
        old.insertBefore(document.importNode(next, true), place);
        continue;
      }
      keyed.delete(key);
      if (have !== place) {
        old.insertBefore(have, place);
      } else {
        place = place.nextSibling;
      }
      if (next.nodeType === Node.ELEMENT_NODE) become(have, next);
      else if (have.data !== next.data) have.data = next.data;
    }
    while (place) {
      const rest = place.nextSibling;
      place.remove();
      place = rest;
    }
  };

  const look = () => {
    if (asking) { again = true; return; }
    asking = true;
    const request = new XMLHttpRequest(); // it parses a document, without a sink for strings of HTML
    request.open("GET", location.href);
    request.responseType = "document";
    request.timeout = 10000;
    request.onloadend = () => {
      asking = false;
      const now = request.response;
      if (!now || !now.getElementById("outage")) {
        say("The page is not up to date.");
      } else {
        say(paused ? "Paused." : "");
        for (const old of document.querySelectorAll("[data-live]")) {
          const next = now.getElementById(old.id);
          if (next) become(old, next);
        }
        if (request.status === 200 && !now.body.dataset.events) { // it is over
          delete document.body.dataset.events;
          button.hidden = true;
          listen();
        }
      }
      if (again) { again = false; look(); }
    };
    request.send();
  };

  // listen opens or closes the events: a page that nobody sees asks nothing, and takes none of the few
  // connections that a browser has for a server.
  const listen = () => {
    const url = document.body.dataset.events;
    const wanted = url && !paused && document.visibilityState === "visible";
    if (!wanted && source) { source.close(); source = null; }
    if (!wanted || source) return;
    source = new EventSource(url);
    source.onmessage = look;
    source.onerror = () => {
      say("The page is not up to date.");
      if (source && source.readyState === EventSource.CLOSED) { // it does not try again by itself
        source = null;
        setTimeout(listen, 5000);
      }
    };
  };

  if (document.body.dataset.events) {
    button.hidden = false;
    button.addEventListener("click", () => {
      paused = !paused;
      button.textContent = paused ? "Resume updates" : "Pause updates";
      say(paused ? "Paused." : "");
      listen();
    });
    document.addEventListener("visibilitychange", listen);
    listen();
  }

  // A box above all boxes of a table selects them; there is none without scripts.
  const boxes = [...document.querySelectorAll("td.check input")];
  const corner = document.querySelector("thead td");
  if (boxes.length > 1 && corner) {
    const all = document.createElement("input");
    all.type = "checkbox";
    all.setAttribute("aria-label", "Select all on this page");
    all.addEventListener("change", () => { for (const box of boxes) box.checked = all.checked; });
    corner.append(all);
  }
})();
