//! Pixels and tensors.

use candle_core::{Device, Tensor};
use image::RgbImage;

use crate::{Error, Result};

/// `x / 127.5 − 1`: `[1, 3, H, W]` in [−1, 1], `f32`.
///
/// # Errors
/// When the tensor cannot be made on the device.
pub fn to_tensor(picture: &RgbImage, device: &Device) -> Result<Tensor> {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let values: Vec<f32> = picture.as_raw().iter().map(|&v| f32::from(v) / 127.5 - 1.0).collect();
    let pixels = Tensor::from_vec(values, (1, height, width, 3), &Device::Cpu)?;
    Ok(pixels.permute((0, 3, 1, 2))?.contiguous()?.to_device(device)?)
}

/// `round(255 · clamp(x / 2 + 0.5))` of a tensor `[1, 3, H, W]`; halves to even, as torch rounds.
///
/// # Errors
/// When the tensor has another shape or holds NaN.
pub fn from_tensor(tensor: &Tensor) -> Result<RgbImage> {
    let (_, _, height, width) = tensor.dims4()?;
    let values: Vec<f32> = tensor.to_device(&Device::Cpu)?.permute((0, 2, 3, 1))?.flatten_all()?.to_vec1()?;
    let not_a_picture = || {
        Error::refused(
            "the picture is not finite: the computation overflowed",
            "lower --guidance-scale or --tail-scale, or check the model's weights",
        )
    };
    if values.iter().any(|v| v.is_nan()) {
        return Err(not_a_picture());
    }
    let bytes = values.iter().map(|v| ((v / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8);
    RgbImage::from_raw(width as u32, height as u32, bytes.collect()).ok_or_else(not_a_picture)
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    #[test]
    fn pixels_come_back_unchanged() {
        let picture =
            RgbImage::from_fn(16, 17, |x, y| Rgb([(x * 16) as u8, (y * 15) as u8, (x * y % 256) as u8]));
        let tensor = to_tensor(&picture, &Device::Cpu).unwrap();
        assert_eq!(tensor.dims(), [1, 3, 17, 16]);
        assert_eq!(
            tensor.get(0).unwrap().get(0).unwrap().get(3).unwrap().to_vec1::<f32>().unwrap()[1],
            16.0 / 127.5 - 1.0
        );
        assert_eq!(from_tensor(&tensor).unwrap(), picture);
    }

    #[test]
    fn values_are_clamped_and_nan_is_refused() {
        let picture = |v: f32| from_tensor(&Tensor::full(v, (1, 3, 1, 1), &Device::Cpu).unwrap());
        assert_eq!(picture(7.0).unwrap().get_pixel(0, 0).0, [255; 3]);
        assert_eq!(picture(-7.0).unwrap().get_pixel(0, 0).0, [0; 3]);
        assert_eq!(picture(0.0).unwrap().get_pixel(0, 0).0, [128; 3], "127.5 rounds to even");
        assert!(picture(f32::NAN).is_err());
    }
}
