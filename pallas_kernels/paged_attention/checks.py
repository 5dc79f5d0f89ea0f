"""What both Triton bodies refuse: they address pages alike."""

from jaxtyping import Array, Float

from pallas_kernels.bodies import Body, refuse


def check_triton_pages(k_pages: Float[Array, "P K page H"], body: Body) -> None:
    """Raises NotImplementedError for pages that the kernels cannot address: a product needs 16 rows of keys."""
    page_size, head_dim = k_pages.shape[2:]
    for name, size in {"head_dim": head_dim, "page size": page_size}.items():
        if size < 16 or size & (size - 1):
            raise refuse("paged_attention", body, f"needs a {name} of 16, 32, 64, .., not {size}", tuple(Body))
