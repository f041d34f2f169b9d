"""dre_fast: end-to-end whole-slide training.

Dynamic residual encoding of a slide's tiles against a codebook, a memory bank of every tile, and a slide-level
contrastive loss against pathology reports (DRE-SLCL, arXiv 2511.05034), as drop-in PyTorch modules.
"""

from dre_fast import reference
from dre_fast.codebook import fit_codebook
from dre_fast.nn.bank import MemoryBank
from dre_fast.nn.encoding import ResidualEncoding, residual_encode
from dre_fast.nn.loss import SlideReportLoss
from dre_fast.nn.model import DRESLCL, SlideOutput
from dre_fast.nn.residual_mil import ResidualMIL
from dre_fast.nn.slide_encoder import SlideEncoder

__version__ = "0.1.0"

__all__ = [
    "DRESLCL",
    "MemoryBank",
    "ResidualEncoding",
    "ResidualMIL",
    "SlideEncoder",
    "SlideOutput",
    "SlideReportLoss",
    "__version__",
    "fit_codebook",
    "reference",
    "residual_encode",
]
