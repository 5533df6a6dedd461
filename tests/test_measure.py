"""What the devices' names say of their speed."""

import pytest

from training.measure import peak_tflops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989), ("NVIDIA GH200 144G HBM3e", 989),
        ("NVIDIA B200", 2250), ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("NVIDIA L4", 121), ("NVIDIA A40", 150),
        ("NVIDIA A10", 125), ("NVIDIA A10G", 70), ("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 5090", 210), ("NVIDIA RTX A6000", 155), ("NVIDIA RTX 6000 Ada Generation", 364),
    ],
)  # fmt: skip
def test_the_speed_of_a_device_is_its_models(name: str, tflops: int):
    assert peak_tflops(name) == tflops


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000", "NVIDIA RTX A1000 Laptop GPU", "NVIDIA RTX A4000", "NVIDIA T400 4GB", "NVIDIA T1000",
        "NVIDIA A2", "NVIDIA A16", "NVIDIA GeForce RTX 4070 Laptop GPU", "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4080 SUPER", "Quadro RTX 6000",
        "NVIDIA RTX 4000 Ada Generation", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "GRID A100-10C", "NVIDIA A40-48Q",
        "AMD Instinct MI300X", "",
    ],
)  # fmt: skip
def test_of_another_model_or_a_part_of_one_it_is_unknown(name: str):
    assert peak_tflops(name) is None
