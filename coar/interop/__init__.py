"""What the original projects read and write: stores of memory maps, `.pt` attributions, `.beton` files."""

from coar.interop.beton import Beton, read_beton
from coar.interop.beton_format import BetonField
from coar.interop.beton_writer import write_beton, write_beton_blocks
from coar.interop.export import export_beton, export_store
from coar.interop.importing import import_store
from coar.interop.weights_file import load_weights, save_weights

__all__ = [
    "Beton",
    "BetonField",
    "export_beton",
    "export_store",
    "import_store",
    "load_weights",
    "read_beton",
    "save_weights",
    "write_beton",
    "write_beton_blocks",
]
