"""SAGE for torch.hub: torch.hub.load('FOLDER or owner/repository', 'sage_nano') and so on; see torch.hub.list and torch.hub.help."""
from sage.model import create_sage, load_official

dependencies = ['torch', 'torchvision', 'timm', 'safetensors', 'huggingface_hub', 'fastcore', 'numpy', 'pandas', 'scipy', 'sklearn', 'pyproj', 'PIL', 'tqdm']

def sage(backbone='vit_base_patch14_dinov2.lvd142m', **options):
    "An untrained SAGE on a frozen backbone, any plain vision transformer of timm; options as for sage.model.create_sage (pretrained, interact, seed, …)."
    return create_sage(backbone, **options).eval()

def sage_nano(**options):
    "An untrained SAGE on the packaged small backbone: no download, images of 112 x 112."
    return sage('sage_nano', **options)

def sage_official(checkpoint, **options):
    "The authors' released weights from their file (.pth); options as for sage.model.load_official (num_heads, interact_heads, img_size, fused)."
    return load_official(checkpoint, **options)
