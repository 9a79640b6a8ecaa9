"""The GEMM limit counts exactly the products that the model requests."""

import torch

from benchmarks.gemm import MatrixProduct, gemm_runner, matrix_products, total_flops
from modeling_sslam import SSLAMForAudioClassification, SSLAMModel


def test_products_of_a_forward_pass(tiny_config):
    model = SSLAMModel(tiny_config).eval()
    clips, frames = 3, 64
    input_values = torch.randn(clips, frames, tiny_config.num_mel_bins)
    with torch.no_grad():
        products = matrix_products(lambda: model(input_values))
    with torch.inference_mode():
        assert matrix_products(lambda: model(input_values)) == products

    patches = frames // 16 * tiny_config.num_mel_patches
    tokens, width, mlp = patches + 1, tiny_config.hidden_size, tiny_config.intermediate_size
    heads = tiny_config.num_attention_heads
    layers = tiny_config.num_hidden_layers
    linear = 2 * clips * tokens * (4 * width * width + 2 * width * mlp)
    attention = 2 * 2 * clips * tokens * tokens * width
    assert total_flops(products) == layers * (linear + attention) + 2 * clips * patches * 256 * width
    assert products[MatrixProduct(clips * heads, tokens, width // heads, tokens, torch.float32)] == layers
    assert products[MatrixProduct(1, clips * patches, 256, width, torch.float32)] == 1


def test_a_backward_pass_has_twice_the_products_of_the_forward_pass(tiny_config):
    model = SSLAMForAudioClassification(tiny_config)
    input_values = torch.randn(2, 64, tiny_config.num_mel_bins)
    with torch.no_grad():
        forward = total_flops(matrix_products(lambda: model(input_values)))
    both = total_flops(matrix_products(lambda: model(input_values).logits.sum().backward()))
    patches = 2 * 4 * tiny_config.num_mel_patches
    gradient_of_the_input = 2 * patches * 256 * tiny_config.hidden_size  # which is not requested
    assert both == 3 * forward - gradient_of_the_input


def test_a_grouped_convolution_is_a_product_for_each_group():
    weight = torch.randn(12, 2, 3, 3, requires_grad=True)  # 4 groups of 2 channels to 3
    image = torch.randn(5, 8, 6, 6, requires_grad=True)

    def convolve() -> torch.Tensor:
        return torch.nn.functional.conv2d(image, weight, padding="same", groups=4).sum()

    products = matrix_products(lambda: convolve().backward())
    one_way = 2 * 4 * (5 * 36) * (2 * 9) * 3
    assert total_flops(products) == 3 * one_way


def test_a_runner_computes_all_products(tiny_config):
    products = {MatrixProduct(1, 8, 16, 4, torch.float32): 2, MatrixProduct(3, 8, 16, 4, torch.float32): 1}
    run = gemm_runner(products, torch.device("cpu"), kernels=("torch",))
    with torch.no_grad():
        assert matrix_products(run) == products
