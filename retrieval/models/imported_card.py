"""The model card of an imported model, in Markdown: what was imported, and what is not known of it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retrieval.models.bundle import ModelBundle


def describe(bundle: "ModelBundle") -> str:
    """Returns the card of an imported model."""
    recipe, faces = bundle.recipe, bundle.preprocessing.faces
    length = "divided by its length" if bundle.embedding.length == "unit" else "as the network gives it"
    mirrored = "the mean of a picture and its mirror image, " if "mirrored" in recipe else ""
    rows = {
        "file": _code(recipe["network"]),
        "SHA-256 of the file": f"`{recipe['network_sha256']}`",
        **({"preset": recipe["preset"]} if "preset" in recipe else {}),
        "input": f"{bundle.input_size} x {bundle.input_size} pixels, {recipe['colour'].upper()}, "
        f"{recipe['layout'].upper()}, (x - mean) / std for x of 0 to 255",
        "mean": _numbers(recipe["mean"]),
        "std": _numbers(recipe["std"]),
        "embedding": f"{bundle.dimension:,} numbers of the output {_code(recipe['output'])}, "
        f"{mirrored}{length}",
        "photos": str(bundle.preprocessing),
        "face detector": "none: photos must show one face, cropped and aligned as the network expects it"
        if faces is None
        else f"SHA-256 `{faces.detector}`, least score {faces.score:g}",
        "software": ", ".join(f"{name} {number}" for name, number in bundle.versions.items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""# Model card: {bundle.fingerprint[:12]}

A face recognition model that was imported into faceprint on {bundle.created_at[:10]} from an ONNX file.
Faceprint did not train it. It turns a photograph of a person into {bundle.dimension:,} numbers, so that
photographs of one person lie near each other. It has no classifier.
Fingerprint: `{bundle.fingerprint}`.

**It processes biometric data.** In many countries the law forbids processing embeddings of faces without
the explicit consent of the people concerned or another narrow ground. Faceprint's `docs/privacy.md` says
what is stored and how a person is forgotten.

## What was imported

| | |
|---|---|
{table}

When it was imported, the network gave finite and different embeddings for different pictures, and the same
alone and in a batch. Whether the options above are those that it was trained with is not known to
faceprint: wrong ones cost accuracy without an error. `faceprint evaluate` measures it.

## What is not known

- Who trained the network, on whose photos, and whether these people agreed.
- Its licence, and what it permits. Many published weights are for research only.
- How good it is, also for groups of people: by age, sex, skin tone, origin, disability or dress.

*To be filled in by whoever imported the model.*
"""


def _numbers(values: list[float]) -> str:
    """Returns one number for each channel, or one that all have."""
    return ", ".join(f"{value:g}" for value in (values[:1] if len(set(values)) == 1 else values))


def _code(name: str) -> str:
    """Returns a name as code in a cell of a table."""
    return f"`{name}`".replace("|", "/") if "`" not in name else name.replace("|", "/")
