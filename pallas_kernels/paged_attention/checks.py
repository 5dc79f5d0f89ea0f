"""What both Triton bodies refuse: they address pages alike."""

from jaxtyping import Array, Float

from pallas_kernels.bodies import Body, refuse


def check_triton_pages(k_pages: Float[Array, "P K page H"], body: Body) -> None:
    """Raises NotImplementedError for pages that the kernels cannot address: a product needs 16 rows of keys."""
    page_size, head_dim = k_pages.shape[2:]
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise refuse("paged_attention", body, f"needs a head_dim of 16, 32, 64, .., not {head_dim}", tuple(Body))
    if page_size < 16 or page_size & (page_size - 1):
        reason = f"needs a page size that is a power of two of at least 16, not {page_size}"
        raise refuse("paged_attention", body, reason, tuple(Body))
