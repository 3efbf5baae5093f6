"""Weight-sharing neural architecture search for timm, with ShiftNAS (Zhang et al., ICCV 2023, arXiv 2307.08300)."""
