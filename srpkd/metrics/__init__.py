"""Image metrics: of pixels (PSNR, SSIM), of Inception features (FID, KID), of segmentation (mIoU, FCN scores)."""
