// Draws 3D Gaussians with WebGL 2: what see3d_jax/splatting does, for browsers.
//
// Every Gaussian is a quad that covers its ellipse in the picture (EWA: Σ' = J W Σ Wᵀ Jᵀ + 0.3,
// Zwicker et al. 2001; Kerbl et al. 2023), blended over what is behind it, farthest first. Its colour
// is that seen from the eye, by spherical harmonics of degree 0 to 3. Sorting is a counting sort on
// this thread: a page that opens from disk may start no worker.
"use strict";

const Splats = (() => {
  const ROW = 32; // bytes of a Gaussian in a .splat file
  const WIDTH = 4096; // texels of the data textures
  const SHAPE = 3; // texels that hold place, shape and opacity of a Gaussian
  const BINS = 1 << 14;

  const VERTEX = `#version 300 es
  precision highp float;
  precision highp int;
  uniform highp sampler2D table, harmonics;
  uniform int coefficients; // 1, 4, 9 or 16 of each colour
  uniform mat3 worldToCamera;
  uniform vec3 eye;
  uniform vec2 focal, size;
  in vec2 corner;
  in uint index;
  out vec4 colour;
  out vec2 offset;
  vec4 row(int i) {
    int texel = int(index) * ${SHAPE} + i;
    return texelFetch(table, ivec2(texel % ${WIDTH}, texel / ${WIDTH}), 0);
  }
  float part(int i) {
    int texel = int(index) * ((3 * coefficients + 3) / 4) + i / 4;
    return texelFetch(harmonics, ivec2(texel % ${WIDTH}, texel / ${WIDTH}), 0)[i % 4];
  }
  vec3 sh(int k) { return vec3(part(3 * k), part(3 * k + 1), part(3 * k + 2)); }
  vec3 seen(vec3 d) { // order and signs of 3DGS files
    float x = d.x, y = d.y, z = d.z;
    vec3 sum = 0.5 + 0.28209479177387814 * sh(0);
    if (coefficients > 1) {
      sum += 0.4886025119029199 * (-y * sh(1) + z * sh(2) - x * sh(3));
    }
    if (coefficients > 4) {
      sum += 1.0925484305920792 * (x * y * sh(4) - y * z * sh(5) - x * z * sh(7));
      sum += 0.31539156525252005 * (2.0 * z * z - x * x - y * y) * sh(6);
      sum += 0.5462742152960396 * (x * x - y * y) * sh(8);
    }
    if (coefficients > 9) {
      sum -= 0.5900435899266435 * y * (3.0 * x * x - y * y) * sh(9);
      sum += 2.890611442640554 * x * y * z * sh(10);
      sum -= 0.4570457994644658 * y * (4.0 * z * z - x * x - y * y) * sh(11);
      sum += 0.3731763325901154 * z * (2.0 * z * z - 3.0 * x * x - 3.0 * y * y) * sh(12);
      sum -= 0.4570457994644658 * x * (4.0 * z * z - x * x - y * y) * sh(13);
      sum += 1.445305721320277 * z * (x * x - y * y) * sh(14);
      sum -= 0.5900435899266435 * x * (x * x - 3.0 * y * y) * sh(15);
    }
    return max(sum, 0.0);
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
    colour = vec4(seen(normalize(row(0).xyz - eye)), b.z);
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

  /** Means [N·3] and the data textures: a .splat file, then N × harmonics as half floats. */
  function parse(bytes, coefficients) {
    const texels = Math.ceil(3 * coefficients / 4);
    const count = Math.floor(bytes.byteLength / (ROW + 8 * texels));
    const halves = new Uint16Array(WIDTH * 4 * Math.max(1, Math.ceil(count * texels / WIDTH)));
    halves.set(new Uint16Array(bytes, ROW * count, 4 * texels * count));
    const floats = new Float32Array(bytes, 0, count * 8);
    const octets = new Uint8Array(bytes, 0, count * ROW);
    const table = new Float32Array(WIDTH * 4 * Math.max(1, Math.ceil(count * SHAPE / WIDTH)));
    const means = new Float32Array(count * 3);
    for (let i = 0; i < count; i++) {
      const at = i * SHAPE * 4;
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
      table.set([sigma(1, 2), sigma(2, 2), octets[ROW * i + 27] / 255], at + 8);
    }
    return { count, means, table, halves };
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

  function texture(gl, unit, format, type, values) {
    gl.activeTexture(gl.TEXTURE0 + unit);
    gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
    gl.texImage2D(
      gl.TEXTURE_2D, 0, format, WIDTH, values.length / 4 / WIDTH, 0, gl.RGBA, type, values);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
  }

  /**
   * A function that draws the scene: draw({worldToCamera rows, eye, fx, fy, visible}).
   * bytes: see parse; coefficients: of the harmonics, 1, 4, 9 or 16 of each colour.
   */
  function renderer(canvas, bytes, coefficients) {
    const gl = canvas.getContext("webgl2", {
      antialias: false, alpha: false, preserveDrawingBuffer: true,
    });
    if (!gl) throw new Error("no WebGL 2");
    const { count, means, table, halves } = parse(bytes, coefficients);
    const program = compile(gl);
    gl.useProgram(program);
    texture(gl, 0, gl.RGBA32F, gl.FLOAT, table);
    texture(gl, 1, gl.RGBA16F, gl.HALF_FLOAT, halves);
    gl.uniform1i(gl.getUniformLocation(program, "table"), 0);
    gl.uniform1i(gl.getUniformLocation(program, "harmonics"), 1);
    gl.uniform1i(gl.getUniformLocation(program, "coefficients"), coefficients);
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
