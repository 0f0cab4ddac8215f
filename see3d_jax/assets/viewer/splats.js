// Draws 3D Gaussians with WebGL 2: what see3d_jax/splatting does, for browsers.
//
// Every Gaussian is a quad that covers its ellipse in the picture (EWA: Σ' = J W Σ Wᵀ Jᵀ + 0.3,
// Zwicker et al. 2001; Kerbl et al. 2023), blended over what is behind it, farthest first. Sorting
// is a counting sort on this thread: a page that opens from disk may start no worker.
"use strict";

const Splats = (() => {
  const ROW = 32; // bytes of a Gaussian in a .splat file
  const WIDTH = 1024; // texels of the data texture; 4 of them hold a Gaussian
  const BINS = 1 << 14;

  const VERTEX = `#version 300 es
  precision highp float;
  precision highp int;
  uniform highp sampler2D table;
  uniform mat3 worldToCamera;
  uniform vec3 eye;
  uniform vec2 focal, size;
  in vec2 corner;
  in uint index;
  out vec4 colour;
  out vec2 offset;
  vec4 row(int i) {
    int texel = int(index) * 4 + i;
    return texelFetch(table, ivec2(texel % ${WIDTH}, texel / ${WIDTH}), 0);
  }
  void main() {
    gl_Position = vec4(0.0, 0.0, 2.0, 1.0);
    vec3 p = worldToCamera * (row(0).xyz - eye);
    if (p.z < 1e-3) return;
    vec4 a = row(1), b = row(2);
    mat3 sigma = mat3(a.x, a.y, a.z, a.y, a.w, b.x, a.z, b.x, b.y);
    vec2 limit = 0.65 * size / focal; // as far outside of the picture as the projection is linear
    vec2 at = clamp(p.xy / p.z, -limit, limit);
    mat3 jacobian = mat3(focal.x / p.z, 0, 0, 0, focal.y / p.z, 0,
      -focal.x * at.x / p.z, -focal.y * at.y / p.z, 0);
    mat3 t = jacobian * worldToCamera;
    mat3 flat2 = t * sigma * transpose(t);
    float xx = flat2[0][0] + 0.3, yy = flat2[1][1] + 0.3, xy = flat2[0][1];
    float middle = 0.5 * (xx + yy), spread = length(vec2(0.5 * (xx - yy), xy));
    float wide = middle + spread, narrow = max(middle - spread, 0.05);
    vec2 axis = abs(xy) < 1e-9 ? (xx >= yy ? vec2(1, 0) : vec2(0, 1))
      : normalize(vec2(xy, wide - xx));
    colour = row(3);
    float reach = sqrt(2.0 * log(max(255.0 * colour.a, 1.0))); // where alpha falls below 1 / 255
    offset = corner * reach;
    vec2 shift = offset.x * sqrt(wide) * axis + offset.y * sqrt(narrow) * vec2(-axis.y, axis.x);
    vec2 pixel = 0.5 * size + focal * p.xy / p.z + shift;
    gl_Position = vec4(2.0 * pixel.x / size.x - 1.0, 1.0 - 2.0 * pixel.y / size.y, 0.0, 1.0);
  }`;

  const FRAGMENT = `#version 300 es
  precision highp float;
  in vec4 colour;
  in vec2 offset;
  out vec4 pixel;
  void main() {
    float alpha = min(0.99, colour.a * exp(-0.5 * dot(offset, offset)));
    if (alpha < 1.0 / 255.0) discard;
    pixel = vec4(colour.rgb * alpha, alpha);
  }`;

  /** Means [N·3] and the data texture of a .splat file. */
  function parse(bytes) {
    const count = Math.floor(bytes.byteLength / ROW);
    const floats = new Float32Array(bytes, 0, count * 8);
    const octets = new Uint8Array(bytes, 0, count * ROW);
    const height = Math.max(1, Math.ceil(count * 4 / WIDTH));
    const table = new Float32Array(WIDTH * height * 4);
    const means = new Float32Array(count * 3);
    for (let i = 0; i < count; i++) {
      const at = i * 16;
      for (let k = 0; k < 3; k++) means[3 * i + k] = table[at + k] = floats[8 * i + k];
      const scale = floats.subarray(8 * i + 3, 8 * i + 6);
      const q = [0, 1, 2, 3].map((k) => (octets[ROW * i + 28 + k] - 128) / 128);
      const norm = Math.hypot(...q) || 1;
      const [w, x, y, z] = q.map((v) => v / norm);
      const r = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
      ];
      const sigma = (u, v) => [0, 1, 2].reduce(
        (sum, k) => sum + r[3 * u + k] * r[3 * v + k] * scale[k] * scale[k], 0);
      table.set([sigma(0, 0), sigma(0, 1), sigma(0, 2), sigma(1, 1)], at + 4);
      table.set([sigma(1, 2), sigma(2, 2)], at + 8);
      for (let k = 0; k < 4; k++) table[at + 12 + k] = octets[ROW * i + 24 + k] / 255;
    }
    return { count, means, table, height };
  }

  function compile(gl) {
    const program = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) {
        throw new Error(gl.getShaderInfoLog(shader));
      }
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) {
      throw new Error(gl.getProgramInfoLog(program));
    }
    return program;
  }

  /** A function that draws the scene: draw({worldToCamera rows, eye, fx, fy, visible}). */
  function renderer(canvas, bytes) {
    const gl = canvas.getContext("webgl2", {
      antialias: false, alpha: false, preserveDrawingBuffer: true,
    });
    if (!gl) throw new Error("no WebGL 2");
    const { count, means, table, height } = parse(bytes);
    const program = compile(gl);
    gl.useProgram(program);
    gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA32F, WIDTH, height, 0, gl.RGBA, gl.FLOAT, table);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 1, -1, -1, 1, 1, 1]), gl.STATIC_DRAW);
    const corner = gl.getAttribLocation(program, "corner");
    gl.enableVertexAttribArray(corner);
    gl.vertexAttribPointer(corner, 2, gl.FLOAT, false, 0, 0);
    const order = new Uint32Array(count);
    const indices = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, indices);
    const index = gl.getAttribLocation(program, "index");
    gl.enableVertexAttribArray(index);
    gl.vertexAttribIPointer(index, 1, gl.UNSIGNED_INT, 0, 0);
    gl.vertexAttribDivisor(index, 1);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.clearColor(0, 0, 0, 1);
    const place = Object.fromEntries(["worldToCamera", "eye", "focal", "size"]
      .map((name) => [name, gl.getUniformLocation(program, name)]));
    const depths = new Float32Array(count);
    const starts = new Uint32Array(BINS + 1);

    function sort(forward, eye) { // farthest first
      let near = Infinity, far = -Infinity;
      for (let i = 0; i < count; i++) {
        const d = forward[0] * (means[3 * i] - eye[0]) + forward[1] * (means[3 * i + 1] - eye[1]) +
          forward[2] * (means[3 * i + 2] - eye[2]);
        depths[i] = d;
        if (d < near) near = d;
        if (d > far) far = d;
      }
      near = Math.max(near, 0); // what is behind is not drawn
      const step = (BINS - 1) / Math.max(far - near, 1e-9);
      const bin = (d) => Math.max(0, Math.min(BINS - 1, ((far - d) * step) | 0));
      starts.fill(0);
      for (let i = 0; i < count; i++) starts[bin(depths[i]) + 1]++;
      for (let b = 0; b < BINS; b++) starts[b + 1] += starts[b];
      for (let i = 0; i < count; i++) order[starts[bin(depths[i])]++] = i;
    }

    return ({ worldToCamera, eye, fx, fy, visible }) => {
      const ratio = Math.min(window.devicePixelRatio || 1, 2);
      canvas.width = Math.round(canvas.clientWidth * ratio);
      canvas.height = Math.round(canvas.clientHeight * ratio);
      gl.viewport(0, 0, canvas.width, canvas.height);
      gl.clear(gl.COLOR_BUFFER_BIT);
      if (!visible || !count) return;
      sort(worldToCamera[2], eye);
      gl.bufferData(gl.ARRAY_BUFFER, order, gl.DYNAMIC_DRAW);
      gl.uniformMatrix3fv(place.worldToCamera, true, worldToCamera.flat());
      gl.uniform3fv(place.eye, eye);
      gl.uniform2f(place.focal, fx * ratio, fy * ratio);
      gl.uniform2f(place.size, canvas.width, canvas.height);
      gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, count);
    };
  }

  return { renderer };
})();
