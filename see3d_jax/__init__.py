"""see3d_jax: See3D (CVPR 2025) in JAX: curation, training, generation and Gaussian splatting."""
