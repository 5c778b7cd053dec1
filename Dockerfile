# prunetune with everything that training and evaluation use. Written to be read: it has not been built where the tests run.
#
#   docker build --tag prunetune:cpu .
#   docker build --tag prunetune:cuda --build-arg TORCH_BUILD=cu128 .
#   docker run --rm --gpus all --shm-size 16g -v /data:/data -v "$PWD/runs:/work/runs" prunetune:cuda recalibrate --config ...
#
# PyTorch's CUDA wheels bring CUDA's libraries, and nothing is compiled: the driver of the host is all that a GPU needs.
FROM python:3.12-slim

ARG TORCH_BUILD=cpu
ARG TORCH=torch==2.13.0

# DeepSpeed asks for a C++ compiler when it makes its operations; git names the commit in records; Java scores captions.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git default-jre-headless \
    && rm -rf /var/lib/apt/lists/*

RUN pip install --no-cache-dir "${TORCH}" --index-url "https://download.pytorch.org/whl/${TORCH_BUILD}"

WORKDIR /opt/prunetune
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY assets assets
COPY configs configs
COPY data_recipes data_recipes
COPY evaluation evaluation
COPY models models
COPY prunetune prunetune
COPY pruning pruning
COPY scripts scripts
COPY serving serving
COPY tiny_world tiny_world
COPY train train
RUN pip install --no-cache-dir --constraint constraints.txt ".[all,serve,captions]"

# Files that a container writes belong to an ordinary user.
RUN useradd --create-home prunetune && mkdir /work && chown prunetune /work
USER prunetune
WORKDIR /work
ENV OMP_WAIT_POLICY=PASSIVE
ENTRYPOINT ["prunetune"]
CMD ["--help"]
