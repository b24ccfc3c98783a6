"""The conformance kit: test vectors of preference optimisation, and a judge. See README.md."""

from reference.conformance.cases import Case, load_cases
from reference.conformance.judge import Adapter, Result, judge
from reference.conformance.report import Report, run

__version__ = "1.5.0"
"""The first number is that of the vectors, whose ids and meaning do not change."""

__all__ = ["Adapter", "Case", "Report", "Result", "judge", "load_cases", "run"]
