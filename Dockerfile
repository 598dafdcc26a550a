# The image of all benchmarks: torch, torchvision and CUDA as the base brings them, all else from requirements.lock.
#
#   docker build --build-arg GIT_COMMIT="$(git rev-parse HEAD)" -t detectors .
#
# BASE: any Debian or Ubuntu image with Python 3.11 or newer, pip, torch 2.11 to 2.15 and torchvision. The default one
# has torch 2.13.0a0+9186a08b2c, CUDA 13.3 and Python 3.12.
# EXTRAS: more of pyproject.toml's optional dependencies, such as dali.
# CUDA_ARCHITECTURES: what setup.py's CUDA extensions are compiled for. Not called TORCH_CUDA_ARCH_LIST, because the
# base sets that variable, which an ARG of the same name could not change.
# A package index of your own: --secret id=pip,src=$HOME/.config/pip/pip.conf; the image does not keep it.
ARG BASE=nvcr.io/nvidia/pytorch:26.07-py3
FROM ${BASE}
ARG BASE

# Our packages go to a virtual environment that sees the base's: nothing of the base is replaced or removed.
RUN torch=$(python3 -c 'from importlib.metadata import version; print(version("torchvision") and version("torch"))'); \
    case "$torch" in \
    2.1[1-5].*) python3 -m venv --without-pip --system-site-packages /opt/venv ;; \
    *) echo "Dockerfile: BASE=$BASE has torch ${torch:-or torchvision missing}; wanted: 2.11 to 2.15, with torchvision" >&2; exit 1 ;; \
    esac

# The base decides which versions there are. The font is for the names of classes on pictures.
# hadolint ignore=DL3008
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends numactl fonts-unifont && \
    rm -rf /var/lib/apt/lists/*

# NGC's base limits pip to the versions of its own packages by PIP_CONSTRAINT. HOME and USER are for any uid, also one
# without an entry in /etc/passwd.
ENV PATH=/opt/venv/bin:$PATH \
    PIP_CONSTRAINT="" \
    HOME=/workspace/home \
    USER=detector
# Enroot runs commands through a login shell, whose /etc/profile sets PATH anew on Debian.
RUN echo "PATH=/opt/venv/bin:\$PATH" >/etc/profile.d/detectors.sh
WORKDIR /workspace/ssd

COPY pyproject.toml requirements.lock ./
ARG EXTRAS=""
# EXTRAS is a list of words.
# hadolint ignore=SC2086
RUN --mount=type=secret,id=pip \
    export PIP_CONFIG_FILE=/run/secrets/pip && \
    grep -Ev '^(torch|torchvision|triton|nvidia-[^=]*|cuda-[^=]*)==' requirements.lock >/tmp/lock && \
    python -m pip install --no-cache-dir --no-deps -r /tmp/lock setuptools==80.9.0 && \
    python -c 'from importlib.metadata import version; \
print(*(f"{name}=={version(name)}" for name in ("torch", "torchvision")), sep="\n")' >>/tmp/lock && \
    python -c 'import sys, tomllib; known = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
print(*(wanted for extra in sys.argv[1:] for wanted in known[extra]), sep="\n")' $EXTRAS >/tmp/extras && \
    python -m pip install --no-cache-dir -c /tmp/lock -r /tmp/extras && \
    rm /tmp/lock /tmp/extras

# Editable, so that the extensions lie beside the sources that run_and_time.sh puts first on Python's path. A base
# without a compiler goes on with the PyTorch references.
COPY . .
ARG CUDA_ARCHITECTURES="8.0 9.0 10.0+PTX"
RUN export TORCH_CUDA_ARCH_LIST="$CUDA_ARCHITECTURES" && \
    { ! command -v g++ || python setup.py build_ext --inplace; } && \
    python -m pip install --no-cache-dir --no-index --no-deps --no-build-isolation --editable . && \
    python -m compileall -q . && \
    mkdir -p /datasets/open-images-v6 /torch-home /workspace/ssd_dataset /results build results "$HOME" && \
    chmod 1777 /results build results "$HOME"

ARG GIT_COMMIT=unknown
ENV GIT_COMMIT=${GIT_COMMIT}
LABEL org.opencontainers.image.title="detectors trained to MLPerf's rules" \
      org.opencontainers.image.revision="${GIT_COMMIT}" \
      org.opencontainers.image.base.name="${BASE}"
