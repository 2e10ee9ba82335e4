"""A face detector of the YuNet family for tests: it finds drawn marks, exactly.

A mark is a square of 8, 16 or 32 pixels in a colour of its size. The grid of that stride predicts, in the
cell that the mark fills, a face of 6 x 6 cells around it.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

from retrieval.images.face_detector import FaceDetector

# The colours of marks by their side, RGB: two channels are full and one is empty.
COLOURS = {8: (255, 0, 255), 16: (0, 255, 255), 32: (255, 255, 0)}

# The face that is found, in cells: the box is 6 x 6 cells around the middle of the mark.
BOX_CELLS = 6.0
# The landmarks in cells, from the middle of the mark: a frontal face.
LANDMARKS = np.array([[-1.0, -1.0], [1.0, -1.0], [0.0, 0.0], [-0.75, 1.25], [0.75, 1.25]])


@cache
def graph(fixed: int | None = None) -> bytes:
    """Returns the ONNX file of the detector; with `fixed`, for pictures of that size only."""
    nodes, outputs, initializers = [], [], []

    def constant(name: str, value: np.ndarray) -> str:
        initializers.append(numpy_helper.from_array(value, name))
        return name

    for stride, colour in COLOURS.items():
        # 1 for a cell of the colour, 0 for a grey one. The network takes BGR.
        weights = [1 / 510 if level else -1 / 255 for level in reversed(colour)]
        constant(f"colour_{stride}", np.array(weights, np.float32).reshape(1, 3, 1, 1))
        nodes.append(
            helper.make_node(
                "AveragePool",
                ["input"],
                [f"mean_{stride}"],
                kernel_shape=[stride, stride],
                strides=[stride, stride],
            )
        )
        nodes.append(helper.make_node("Conv", [f"mean_{stride}", f"colour_{stride}"], [f"match_{stride}"]))
        nodes.append(helper.make_node("Relu", [f"match_{stride}"], [f"score_{stride}"]))
        column = constant(f"column_{stride}", np.array([1, -1, 1], np.int64))
        nodes.append(helper.make_node("Reshape", [f"score_{stride}", column], [f"cls_{stride}"]))
        nodes.append(helper.make_node("Identity", [f"cls_{stride}"], [f"obj_{stride}"]))
        box = np.array([0.5, 0.5, np.log(BOX_CELLS), np.log(BOX_CELLS)], np.float32)
        marks = (LANDMARKS + 0.5).astype(np.float32).ravel()
        for name, values in (("bbox", box), ("kps", marks)):
            nothing = constant(f"nothing_{name}_{stride}", np.zeros((1, len(values)), np.float32))
            add = constant(f"add_{name}_{stride}", values.reshape(1, 1, -1))
            nodes.append(helper.make_node("MatMul", [f"cls_{stride}", nothing], [f"zero_{name}_{stride}"]))
            nodes.append(helper.make_node("Add", [f"zero_{name}_{stride}", add], [f"{name}_{stride}"]))
    for part in ("cls", "obj", "bbox", "kps"):
        for stride in COLOURS:
            columns = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}[part]
            cells = None if fixed is None else (fixed // stride) ** 2
            shape = [1, cells or "cells", columns]
            outputs.append(helper.make_tensor_value_info(f"{part}_{stride}", TensorProto.FLOAT, shape))
    size = [fixed, fixed] if fixed is not None else ["height", "width"]
    made = helper.make_graph(
        nodes,
        "marks",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, *size])],
        outputs,
        initializers,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@cache
def detector() -> FaceDetector:
    """Returns the opened detector."""
    return FaceDetector(graph())


def drawn(size: tuple[int, int], marks: Sequence[tuple[int, int, int]], *, seed: int = 0) -> Image.Image:
    """Returns a picture with marks, each of a left, a top and a side; left and top are multiples of the side.

    A face is drawn around each mark, in colours of the seed and the mark's number.
    """
    random, colours = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    grey = random.integers(90, 160, (size[1] // 8 + 1, size[0] // 8 + 1), dtype=np.uint8)
    picture = Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR).convert("RGB")
    draw = ImageDraw.Draw(picture)
    for left, top, side in marks:
        level, ink = int(colours.integers(120, 250)), int(colours.integers(0, 100))
        draw.ellipse((left - 2 * side, top - 2 * side, left + 3 * side, top + 3 * side), fill=(level,) * 3)
        for across in (-1, 1):
            x = left + side / 2 + across * side
            draw.ellipse((x - side / 4, top - side * 3 / 4, x + side / 4, top - side / 4), fill=(ink,) * 3)
        draw.rectangle((left, top, left + side - 1, top + side - 1), fill=COLOURS[side])
    return picture


def save(path: Path, size: tuple[int, int], marks: Sequence[tuple[int, int, int]], *, seed: int = 0) -> Path:
    """Writes `drawn` to a file and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn(size, marks, seed=seed).save(path)
    return path
