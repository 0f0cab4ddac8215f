// The viewer of see3d_jax: Gaussians, cameras, pictures, and an editor for camera paths.
//
// Conventions are those of the Python side: OpenCV camera axes (x right, y down, z forward),
// world-to-camera matrices as rows, pixel centres at +0.5. No part of the page comes from elsewhere.
"use strict";

(() => {
  const root = document.getElementById("see3d-viewer");
  const data = JSON.parse(document.getElementById("see3d-data").textContent);

  // --- small maths: vectors are [x, y, z], rotations 3×3 arrays of rows -------------------------
  const add = (a, b) => a.map((v, i) => v + b[i]);
  const sub = (a, b) => a.map((v, i) => v - b[i]);
  const times = (a, s) => a.map((v) => v * s);
  const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
  const cross = (a, b) => [
    a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0],
  ];
  const length = (a) => Math.hypot(...a);
  const unit = (a) => times(a, 1 / (length(a) || 1));
  const column = (m, i) => [m[0][i], m[1][i], m[2][i]];
  const apply = (m, v) => m.map((row) => dot(row, v));
  const multiply = (a, b) => a.map((row) => [0, 1, 2].map((i) => dot(row, column(b, i))));
  const transpose = (m) => [0, 1, 2].map((i) => column(m, i));

  function about(axis, angle) {
    const [x, y, z] = unit(axis);
    const c = Math.cos(angle), s = Math.sin(angle), k = 1 - c;
    return [
      [c + x * x * k, x * y * k - z * s, x * z * k + y * s],
      [y * x * k + z * s, c + y * y * k, y * z * k - x * s],
      [z * x * k - y * s, z * y * k + x * s, c + z * z * k],
    ];
  }

  function poseOf(worldToCamera) { // camera-to-world: {rotation, eye}
    const rotation = transpose(worldToCamera.slice(0, 3).map((row) => row.slice(0, 3)));
    return { rotation, eye: times(apply(rotation, worldToCamera.slice(0, 3).map((r) => r[3])), -1) };
  }

  // --- the page ----------------------------------------------------------------------------------
  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  };
  const canvas = element("canvas", {
    tabindex: "0", role: "application",
    "aria-label": "3D scene. Arrow keys turn, plus and minus zoom, shift with arrows moves, " +
      "N and P step through the cameras, K keeps the view as a keyframe.",
  });
  const lines = element("canvas", { class: "lines", "aria-hidden": "true" });
  const message = element("p", { class: "message", role: "status" });
  const stage = element("div", { class: "stage" }, canvas, lines, message);
  const shown = { gaussians: true, cameras: true, pictures: true };
  const toggle = (name, text) => element("label", {}, element("input", {
    type: "checkbox", checked: "", "data-toggle": name,
    onchange: (event) => { shown[name] = event.target.checked; refresh(); },
  }), text);
  const names = element("div", { class: "names", role: "group", "aria-label": "Cameras" });
  const pictures = element("div", { class: "pictures" });
  const list = element("ol", { "aria-label": "Keyframes" });
  const fileName = element("input", { value: "path", size: "12" });
  const saved = element("output");
  root.append(
    element("div", {}, stage,
      element("div", { class: "bar" }, toggle("gaussians", "Gaussians"),
        toggle("cameras", "Cameras"), toggle("pictures", "Pictures"),
        element("button", { type: "button", onclick: () => look(0) }, "Start view")),
      element("details", {}, element("summary", {}, "Mouse, touch and keys"),
        element("p", {}, "Drag to turn, drag with shift or two fingers to move, wheel to zoom. " +
          "Keys, with the scene in focus: arrows turn, shift + arrows move, + and − zoom, " +
          "N / P next and previous camera, K keep this view as a keyframe."))),
    element("div", {},
      element("h3", {}, "Cameras"), names, pictures,
      element("h3", {}, "A path of your own"),
      element("div", { class: "bar" },
        element("button", { type: "button", "data-action": "keep", onclick: keep },
          "Keep this view (K)"),
        element("button", { type: "button", "data-action": "play", onclick: play }, "Play")),
      list,
      element("div", { class: "bar" }, element("label", {}, "Name", fileName),
        element("button", { type: "button", "data-action": "save", onclick: save }, "Save path")),
      saved));

  // --- where we look from ------------------------------------------------------------------------
  const cameras = data.cameras.map((entry) => ({ ...entry, ...poseOf(entry.world_to_camera) }));
  const fallback = {
    width: 640, height: 480, fx: 600, fy: 600, cx: 320, cy: 240, name: "start", kind: "view",
    ...poseOf([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, data.radius * 2.5 || 4], [0, 0, 0, 1]]),
  };
  const first = cameras[0] || fallback;
  const up = unit(cameras.reduce((sum, c) => sub(sum, column(c.rotation, 1)), [0, 0, 0]));
  const upward = length(up) > 0.1 ? up : [0, -1, 0];
  const pose = { rotation: first.rotation, eye: first.eye, distance: data.focus || 3, lens: first };
  const keyframes = [];
  let selected = -1; // the camera we look through
  let chosen = -1; // the one whose pictures are shown

  const forward = () => column(pose.rotation, 2);
  const target = () => add(pose.eye, times(forward(), pose.distance));

  function turn(yaw, pitch) {
    const centre = target();
    const spin = multiply(about(upward, yaw), about(column(pose.rotation, 0), pitch));
    pose.eye = add(centre, apply(spin, sub(pose.eye, centre)));
    pose.rotation = multiply(spin, pose.rotation);
    moved();
  }

  function zoom(factor) {
    const centre = target();
    pose.distance = Math.min(Math.max(pose.distance * factor, 1e-3), 1e4);
    pose.eye = sub(centre, times(forward(), pose.distance));
    moved();
  }

  function pan(right, down) {
    const step = pose.distance;
    pose.eye = add(pose.eye, add(times(column(pose.rotation, 0), right * step),
      times(column(pose.rotation, 1), down * step)));
    moved();
  }

  function moved() {
    selected = -1;
    refresh();
  }

  function look(index) {
    const entry = cameras[index] || first;
    Object.assign(pose, { rotation: entry.rotation, eye: entry.eye, lens: entry });
    selected = cameras.length ? index : -1;
    refresh();
  }

  // --- drawing -----------------------------------------------------------------------------------
  let draw = null; // draws the Gaussians, once they are there
  let asked = false;

  function start(bytes) {
    try {
      draw = Splats.renderer(canvas, bytes, data.harmonics);
    } catch (error) {
      note(`This browser cannot draw the Gaussians (WebGL 2 is needed): ${error.message}`);
    }
    refresh();
  }

  function scale() { // canvas pixels per pixel of the lens: the whole picture is in view
    return Math.min(canvas.clientWidth / pose.lens.width, canvas.clientHeight / pose.lens.height);
  }

  function paint() {
    asked = false;
    drawLines();
    if (!draw) return;
    draw({
      worldToCamera: transpose(pose.rotation), eye: pose.eye, visible: shown.gaussians,
      fx: pose.lens.fx * scale(), fy: pose.lens.fy * scale(),
    });
  }

  function project(point) { // canvas pixels, or null behind the camera
    const [x, y, z] = apply(transpose(pose.rotation), sub(point, pose.eye));
    if (z < 1e-4) return null;
    const s = scale();
    return [
      canvas.clientWidth / 2 + pose.lens.fx * s * x / z,
      canvas.clientHeight / 2 + pose.lens.fy * s * y / z,
    ];
  }

  function drawLines() {
    const pen = lines.getContext("2d");
    lines.width = canvas.clientWidth;
    lines.height = canvas.clientHeight;
    pen.lineWidth = 1.5;
    const stroke = (points, colour) => {
      const places = points.map(project);
      if (places.some((p) => p === null)) return;
      pen.strokeStyle = colour;
      pen.beginPath();
      places.forEach((p, i) => (i ? pen.lineTo(...p) : pen.moveTo(...p)));
      pen.stroke();
    };
    const size = 0.08 * (data.focus || 3);
    const frustum = (lens, at, colour) => {
      const corner = (u, v) => add(at.eye, apply(at.rotation,
        [size * (u - lens.cx) / lens.fx, size * (v - lens.cy) / lens.fy, size]));
      const corners = [corner(0, 0), corner(lens.width, 0), corner(lens.width, lens.height),
        corner(0, lens.height)];
      stroke([...corners, corners[0]], colour);
      corners.forEach((c) => stroke([at.eye, c], colour));
    };
    if (shown.cameras) {
      cameras.forEach((c, i) => {
        if (i !== selected) frustum(c, c, c.kind === "photo" ? "#ef4444" : "#38bdf8");
      });
    }
    keyframes.forEach((k) => frustum(first, k, "#facc15"));
    for (let i = 1; i < keyframes.length; i++) {
      stroke([keyframes[i - 1].eye, keyframes[i].eye], "#facc15");
    }
  }

  function refresh() {
    if (!asked) requestAnimationFrame(paint);
    asked = true;
    [...names.children].forEach((b, i) => b.setAttribute("aria-pressed", String(i === selected)));
    root.dataset.eye = pose.eye.map((v) => v.toFixed(5)).join(" ");
    root.dataset.selected = String(selected);
    if (selected >= 0) chosen = selected;
    const entry = cameras[chosen];
    const wanted = entry && shown.pictures ? entry.name : "";
    if (pictures.dataset.of === wanted) return;
    pictures.dataset.of = wanted;
    pictures.replaceChildren(...(wanted ? entry.pictures : []).map((p) => element("figure", {},
      element("img", { src: p.src, alt: `${p.label} of ${entry.name}` }),
      element("figcaption", {}, p.label))));
  }

  const note = (text) => { message.textContent = text; message.hidden = !text; };

  // --- paths -------------------------------------------------------------------------------------
  function keep() {
    keyframes.push({ rotation: pose.rotation, eye: pose.eye });
    listKeyframes();
  }

  function listKeyframes() {
    list.replaceChildren(...keyframes.map((k, i) => element("li", {},
      element("button", {
        type: "button", "aria-label": `Look from keyframe ${i + 1}`,
        onclick: () => { Object.assign(pose, { ...k, lens: first }); moved(); },
      }, "look"), " ",
      element("button", {
        type: "button", "aria-label": `Drop keyframe ${i + 1}`,
        onclick: () => { keyframes.splice(i, 1); listKeyframes(); },
      }, "drop"))));
    refresh();
  }

  function play() {
    if (keyframes.length < 2) return note("Keep two or more views first.");
    note("");
    const seconds = 1.5 * (keyframes.length - 1);
    const began = performance.now();
    const step = (now) => {
      const at = Math.min((now - began) / 1000 / seconds, 1) * (keyframes.length - 1);
      const i = Math.min(Math.floor(at), keyframes.length - 2);
      const [a, b] = [keyframes[i], keyframes[i + 1]];
      const mix = (p, q) => p.map((v, k) => v + (q[k] - v) * (at - i));
      const z = unit(mix(column(a.rotation, 2), column(b.rotation, 2)));
      const x = unit(cross(mix(column(a.rotation, 1), column(b.rotation, 1)), z));
      const y = cross(z, x);
      Object.assign(pose, {
        eye: mix(a.eye, b.eye), lens: first, rotation: [0, 1, 2].map((r) => [x[r], y[r], z[r]]),
      });
      moved();
      if (at < keyframes.length - 1) requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  function transforms() { // a nerfstudio transforms.json: OpenGL axes, camera-to-world
    const frames = keyframes.map((k, i) => ({
      file_path: `keyframe_${String(i).padStart(3, "0")}.png`,
      transform_matrix: [0, 1, 2].map((r) => [
        k.rotation[r][0], -k.rotation[r][1], -k.rotation[r][2], k.eye[r],
      ]).concat([[0, 0, 0, 1]]),
    }));
    return {
      camera_model: "PINHOLE", w: first.width, h: first.height, fl_x: first.fx, fl_y: first.fy,
      cx: first.cx, cy: first.cy, frames,
    };
  }

  async function save() {
    if (!keyframes.length) {
      saved.textContent = "Keep at least one view first (K).";
      return;
    }
    const text = JSON.stringify(transforms(), null, 1);
    const name = fileName.value.trim() || "path";
    if (!data.save) {
      const link = element("a", {
        href: URL.createObjectURL(new Blob([text], { type: "application/json" })),
        download: `${name}.json`,
      });
      link.click();
      saved.textContent = `Saved as ${name}.json: see3d generate … --trajectory ${name}.json`;
      return;
    }
    try {
      const answer = await fetch(`${data.save}?name=${encodeURIComponent(name)}`, {
        method: "POST", body: text, headers: { "X-See3d": "path" },
      });
      const said = await answer.json();
      saved.textContent = said.error || `Saved: see3d generate … --trajectory ${said.path}`;
    } catch (error) {
      saved.textContent = `Not saved: ${error.message}`;
    }
  }

  // --- input -------------------------------------------------------------------------------------
  const fingers = new Map();
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const now = [event.clientX, event.clientY];
    const [dx, dy] = sub([...now, 0], [...before, 0]);
    if (fingers.size === 2) {
      const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
      const gap = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]) || 1;
      zoom(gap(before) / gap(now));
      pan(-dx / 2 / canvas.clientWidth, -dy / 2 / canvas.clientWidth);
    } else if (event.shiftKey || event.buttons === 2) {
      pan(-dx / canvas.clientWidth, -dy / canvas.clientWidth);
    } else {
      turn(dx * 0.005, -dy * 0.005);
    }
    fingers.set(event.pointerId, now);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, (event) => fingers.delete(event.pointerId));
  }
  canvas.style.touchAction = "none";
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(Math.max(-0.3, Math.min(0.3, event.deltaY * 0.001))));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = event.shiftKey ? 0.04 : 0.06;
    const actions = {
      ArrowLeft: () => (event.shiftKey ? pan(-step, 0) : turn(step, 0)),
      ArrowRight: () => (event.shiftKey ? pan(step, 0) : turn(-step, 0)),
      ArrowUp: () => (event.shiftKey ? pan(0, -step) : turn(0, step)),
      ArrowDown: () => (event.shiftKey ? pan(0, step) : turn(0, -step)),
      "+": () => zoom(0.9), "=": () => zoom(0.9), "-": () => zoom(1.1),
      n: () => look((selected + 1) % Math.max(1, cameras.length)),
      p: () => look((selected - 1 + cameras.length) % Math.max(1, cameras.length)),
      k: keep,
    };
    const action = actions[event.key] || actions[event.key.toLowerCase()];
    if (!action) return;
    event.preventDefault();
    action();
  });

  cameras.forEach((c, i) => names.append(element("button", {
    type: "button", class: c.kind, "aria-pressed": "false", onclick: () => look(i),
  }, c.name)));
  new ResizeObserver(refresh).observe(stage);
  note("");
  look(0);

  const embedded = document.getElementById("see3d-splats");
  if (embedded) {
    start(Uint8Array.from(atob(embedded.textContent.trim()), (c) => c.charCodeAt(0)).buffer);
    root.dataset.ready = "yes";
  } else if (data.splats) {
    note("Loading …");
    fetch(data.splats)
      .then((answer) => answer.arrayBuffer())
      .then((bytes) => { start(bytes); note(""); root.dataset.ready = "yes"; })
      .catch((error) => note(`The Gaussians could not be loaded: ${error.message}`));
  } else {
    root.dataset.ready = "yes";
  }
})();
