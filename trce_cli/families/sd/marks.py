"""The names of tensors by which a single file says how it is sampled."""

from typing import Final

V_PRED: Final = "v_pred"  # it predicts v: there or not
ZERO_SNR: Final = "ztsnr"  # its noise schedule ends in noise alone: there or not
EDM: Final = {"edm_mean": "latents_mean", "edm_std": "latents_std"}  # Playground v2.5's -> of the VAE
EDM_V: Final = "edm_vpred.sigma_max"  # CosXL's
MARKS: Final = frozenset({V_PRED, ZERO_SNR, *EDM, EDM_V, "edm_vpred.sigma_min"})
