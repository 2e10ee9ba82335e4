"""The threads of searches: what is computed in the calling thread leaves FAISS there as it was."""

import faiss
import pytest

from retrieval.index.threads import in_this_thread


def test_faiss_has_one_thread_inside_and_those_of_before_afterwards() -> None:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    try:
        with in_this_thread():
            assert faiss.omp_get_max_threads() == 1
        assert faiss.omp_get_max_threads() == 3
        with pytest.raises(ValueError, match="inside"), in_this_thread():
            raise ValueError("inside")
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)
