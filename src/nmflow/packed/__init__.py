"""Packed networks: weights stored as kept values and their columns, in memory and in files."""

from __future__ import annotations

from nmflow.packed.compress import compress, decompress
from nmflow.packed.decoder import OnnxDecoder, export_decoder
from nmflow.packed.export import export_onnx, export_program
from nmflow.packed.files.loading import load
from nmflow.packed.files.saving import save
from nmflow.packed.files.state import load_state, save_state
from nmflow.packed.hand_off import export_onnx_int8, to_semi_structured
from nmflow.packed.onnx_operators import onnxruntime_session_options
from nmflow.packed.report import Report, Row, report_of

__all__ = [
    "OnnxDecoder",
    "Report",
    "Row",
    "compress",
    "decompress",
    "export_decoder",
    "export_onnx",
    "export_onnx_int8",
    "export_program",
    "load",
    "load_state",
    "onnxruntime_session_options",
    "report_of",
    "save",
    "save_state",
    "to_semi_structured",
]
