"""The pages that a person looks at to trust a run."""

from flows.report.evaluation import RetrievalLine, read_retrieval
from flows.report.write import write_evaluation_page, write_report

__all__ = ["RetrievalLine", "read_retrieval", "write_evaluation_page", "write_report"]
