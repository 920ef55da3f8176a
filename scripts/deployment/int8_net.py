"""A trained net in 8-bit integers, as an ONNX file, by onnxruntime's static quantisation.

The net's logits alone are quantised. Normalisation before them, and what makes probabilities of
them, stay float32: logits in 256 steps would coarsen every confidence.
"""

import logging
import math
from collections.abc import Callable
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from scripts.deployment.certificate import Softmax
from scripts.deployment.exported_net import CalibratedNet, onnx_model, onnx_session
from utils.evaluation import CPU_BATCH

RANGED = 512  # images that say how far activations reach
LINEAR = ("Gemm", "MatMul")
WEIGHTED = ("Conv", *LINEAR)


class Logits(nn.Module):
    """The logits of a CalibratedNet, to be exported alone."""

    def __init__(self, net: CalibratedNet):
        super().__init__()
        self.calibrated = net
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.calibrated.logits(images)


class Batches:
    """Images uint8 (N, 3, H, W), as onnxruntime's CalibrationDataReader gives them."""

    def __init__(self, images: Tensor):
        self.pieces = iter(images.split(CPU_BATCH))

    def get_next(self) -> dict | None:
        piece = next(self.pieces, None)
        return None if piece is None else {"images": piece.contiguous().numpy()}


def int8_model(net: CalibratedNet, images: Tensor):
    """The ONNX model of its logits, in int8; the images say how far its activations reach.

    Weights have a scale for each output channel, and 7 bits: with 8, sums of two products overflow
    16 bits on processors without VNNI instructions, and a net would predict otherwise there.
    Activations are 8 bits between the least and the largest value that was seen.
    """
    from onnx import load_model, save_model
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    model = onnx_model(Logits(net), images, output="logits")
    normalisation = takewhile(lambda node: node.op_type not in WEIGHTED, model.graph.node)
    with TemporaryDirectory() as folder, without_advice():
        float32 = Path(folder) / "float32.onnx"
        int8 = Path(folder) / "int8.onnx"
        save_model(model, float32)
        quantize_static(
            float32,
            int8,
            Batches(evenly_spaced(images, RANGED)),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[node.name for node in normalisation],
            extra_options={"OpTypesToExcludeOutputQuantization": list(LINEAR)},
        )
        return load_model(int8)


@contextmanager
def without_advice():
    """onnxruntime advises on standard error to fold layers first, which torch's exporter did."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def evenly_spaced(images: Tensor, count: int) -> Tensor:
    """So many of them or fewer, at equal distances: the images of a class may lie together."""
    return images[:: math.ceil(len(images) / count)]


def logits_of_model(model) -> Callable[[Tensor], Tensor]:
    """What gives the logits (N, K) of an ONNX model, of images uint8 (N, 3, H, W)."""
    session = onnx_session(model.SerializeToString())

    def logits(images: Tensor) -> Tensor:
        [output] = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(output)

    return logits


def with_softmax(model, softmax: Softmax, metadata: dict[str, str]) -> bytes:
    """A file of an ONNX model of logits, with probabilities in their place."""
    from onnx import TensorProto, helper

    graph = model.graph
    [logits] = graph.output
    probabilities = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, None)
    probabilities.type.tensor_type.shape.CopyFrom(logits.type.tensor_type.shape)
    for name, values in softmax._asdict().items():
        graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [len(values)], values))
    graph.node.append(helper.make_node("Mul", [logits.name, "weight"], ["weighted"]))
    graph.node.append(helper.make_node("Add", ["weighted", "bias"], ["calibrated"]))
    graph.node.append(helper.make_node("Softmax", ["calibrated"], [probabilities.name], axis=1))
    graph.output.remove(logits)
    graph.output.append(probabilities)
    helper.set_model_props(model, metadata)
    return model.SerializeToString()
