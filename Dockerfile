# The project in a container; what it does is what the README says: install make, `make install`.
#
#   docker build -t see3d .                                   # CPU
#   docker build -t see3d:gpu --build-arg DEVICE=gpu .        # CUDA 12; the wheels bring CUDA along
#   docker build -t see3d:tpu --build-arg DEVICE=tpu .        # on a TPU VM
#
#   docker run --rm -v "$PWD:/work" see3d generate --help
#   docker run --rm --gpus all -v "$PWD:/work" see3d:gpu generate …     # NVIDIA container toolkit
#   docker run --rm --privileged --net=host -v "$PWD:/work" see3d:tpu … # the TPU's device files
#   docker run --rm -v "$PWD:/work" --entrypoint python see3d -m see3d_jax.main --help
FROM node:24-slim AS detector
# The release that data_prep.install_detector pins, and checks below.
RUN npm pack @mediapipe/objectron@0.4.1675468480 && mv ./*.tgz /detector.tgz

FROM python:3.13-slim-trixie

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/see3d
COPY . .

# cpu, gpu or tpu: the extra of that name. Others may be added: DEVICE=gpu,curate,sfm,metrics
ARG DEVICE=cpu
ENV PIP_NO_CACHE_DIR=1
RUN make install EXTRAS="${DEVICE}"
COPY --from=detector /detector.tgz /tmp/
RUN .venv/bin/python -m data_prep.install_detector --package /tmp/detector.tgz
ENV PATH="/opt/see3d/.venv/bin:${PATH}"

RUN useradd --uid 1000 --create-home see3d
USER 1000
WORKDIR /work
ENTRYPOINT ["see3d"]
CMD ["--help"]
