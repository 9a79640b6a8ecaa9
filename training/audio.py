"""Sound files to waveforms, as [`modeling_sslam.inference.audio`] decodes and resamples them."""

from modeling_sslam.inference.audio import ClipError, read_waveform, resample

__all__ = ["ClipError", "read_waveform", "resample"]
