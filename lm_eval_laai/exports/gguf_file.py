"""A GGUF control vector, which llama.cpp (`--control-vector`) and repeng (`ControlVector.import_gguf`) read."""

from __future__ import annotations

import tempfile
from pathlib import Path

from laai_core.errors import LaaiError
from laai_core.intervention import Intervention
from lm_eval_laai.exports.expressible import Target, scaled
from lm_eval_laai.known_models.package import check_gguf_library

TARGET = Target("a GGUF control vector", positions=("all",), sites={"residual": "direction"})
_ARCHITECTURE = "controlvector"


def control_vector(intervention: Intervention) -> bytes:
    """The file: a tensor `direction.<layer>` for each layer, 0-based as ours, added to that block's output.

    Raises:
        LaaiError: another site, position or operation; layer 0, which llama.cpp refuses; no model type in the
            metadata, which repeng asks for; or no gguf package.
    """
    vectors = scaled(intervention, TARGET)
    if min(vectors) < 1:
        raise LaaiError(f"{TARGET.name} cannot act at layer 0: llama.cpp begins at layer 1")
    model_type = intervention.metadata.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise LaaiError("the intervention's metadata does not say its model_type: a GGUF control vector has to")
    check_gguf_library()
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.gguf"
        writer = gguf.GGUFWriter(path, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(vectors))
        for layer, vector in vectors.items():
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()
