//! From a photo of any size to the size that the model learns at.

use hiper_core::TorchGenerator;
use image::RgbImage;
use image::imageops::{FilterType, crop_imm, resize};
use sd_models::StableDiffusion;

use crate::args::Crop;
use crate::{Error, Result};

/// The longest side that is drawn or learned: beyond, a single attention would take all memory.
const MAX_SIDE: usize = 4096;
/// `--crop none` keeps a photo's proportions up to this one.
const MAX_ASPECT: f64 = 4.0;
/// A longer photo is not cropped: it is scaled before, and a thread of 16 × 6,000,000 pixels would grow to gigabytes.
const MAX_CROPPED_ASPECT: f64 = 16.0;

/// The sizes a model draws.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    /// Every side is a multiple of this: pixels a latent, times the UNet's own downsampling.
    pub multiple: usize,
    /// The side that the model was trained at.
    pub default_side: usize,
}

impl Geometry {
    /// As the model's configuration says.
    pub fn of(model: &StableDiffusion) -> Self {
        let multiple = model.vae_scale_factor() << (model.unet.config().num_levels() - 1);
        Self { multiple, default_side: model.default_size() }
    }

    /// The side that `flag` asks for, or the model's own.
    ///
    /// # Errors
    /// When the model cannot draw it.
    pub fn side(&self, flag: &str, asked: Option<usize>) -> Result<usize> {
        let Some(side) = asked else { return Ok(self.default_side) };
        if side.is_multiple_of(self.multiple) && side <= MAX_SIDE {
            return Ok(side);
        }
        let near = (side as f64 / self.multiple as f64).round().max(1.0) as usize * self.multiple;
        let message = format!(
            "{flag} {side}: must be a multiple of {} for this model, at most {MAX_SIDE}",
            self.multiple
        );
        Err(Error::refused(
            message,
            format!("try {flag} {}", near.min(MAX_SIDE / self.multiple * self.multiple)),
        ))
    }
}

/// Scales the photo (bilinear, with antialiasing) so that its shorter side is `side`, and crops. A photo that has the size
/// already is left alone, to the last bit.
///
/// # Errors
/// When the photo is too long.
pub fn prepare(photo: &RgbImage, side: usize, crop: Crop, seed: u64, geometry: Geometry) -> Result<RgbImage> {
    let (width, height) = (photo.width() as usize, photo.height() as usize);
    let aspect = width.max(height) as f64 / width.min(height) as f64;
    if crop == Crop::None {
        if aspect > MAX_ASPECT {
            return Err(Error::refused(
                format!("--crop none: a photo of {width}x{height} is longer than {MAX_ASPECT} to 1"),
                "use --crop center, or crop the photo first",
            ));
        }
        let longer = (aspect * side as f64 / geometry.multiple as f64).round() as usize * geometry.multiple;
        let size = if width < height { (side, longer) } else { (longer, side) };
        return Ok(scaled(photo, size));
    }
    if aspect > MAX_CROPPED_ASPECT {
        return Err(Error::refused(
            format!("a photo of {width}x{height} is longer than {MAX_CROPPED_ASPECT} to 1"),
            "crop the photo first",
        ));
    }
    let shorter = width.min(height);
    // As torchvision's Resize: the longer side is cut off, not rounded.
    let size = (side * width / shorter, side * height / shorter);
    if size == (side, side) {
        return Ok(scaled(photo, size));
    }
    let (x, y) = match crop {
        // The same photo, seed and size cut the same square. These draws are the crop's own: the run's begin afresh.
        Crop::Random => {
            let mut generator = TorchGenerator::new(seed);
            let mut below = |n: usize| generator.randint(n as u32 + 1) as usize;
            (below(size.0 - side), below(size.1 - side))
        }
        Crop::Center | Crop::None => ((size.0 - side) / 2, (size.1 - side) / 2),
    };
    // Cropping before scaling would spare work, but bleed differently at the edges.
    let all = scaled(photo, size);
    Ok(crop_imm(&all, x as u32, y as u32, side as u32, side as u32).to_image())
}

fn scaled(photo: &RgbImage, (width, height): (usize, usize)) -> RgbImage {
    let size = (width as u32, height as u32);
    if photo.dimensions() == size {
        photo.clone()
    } else {
        resize(photo, size.0, size.1, FilterType::Triangle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    const GEOMETRY: Geometry = Geometry { multiple: 8, default_side: 64 };

    fn gradient(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| Rgb([(x * 255 / width) as u8, (y * 255 / height) as u8, 7]))
    }

    #[test]
    fn a_photo_of_the_right_size_stays_to_the_last_bit() {
        let photo = gradient(64, 64);
        for crop in [Crop::Center, Crop::Random, Crop::None] {
            assert_eq!(prepare(&photo, 64, crop, 0, GEOMETRY).unwrap(), photo);
        }
    }

    #[test]
    fn the_middle_is_kept() {
        let middle = prepare(&gradient(192, 64), 64, Crop::Center, 0, GEOMETRY).unwrap();
        assert_eq!(middle.dimensions(), (64, 64));
        assert_eq!(middle.get_pixel(0, 0).0[0], (64 * 255 / 192) as u8);
        let small = prepare(&gradient(40, 20), 64, Crop::Center, 0, GEOMETRY).unwrap();
        assert_eq!(small.dimensions(), (64, 64));
    }

    #[test]
    fn a_thread_is_refused() {
        let prepared = |length| prepare(&gradient(16, length), 512, Crop::Center, 0, GEOMETRY);
        assert_eq!(prepared(256).unwrap().dimensions(), (512, 512));
        assert!(prepared(257).unwrap_err().to_string().contains("16 to 1"));
    }

    #[test]
    fn a_random_crop_follows_the_seed() {
        let photo = gradient(300, 64);
        let crop = |seed| prepare(&photo, 64, Crop::Random, seed, GEOMETRY).unwrap();
        assert_eq!(crop(1), crop(1));
        assert_ne!(crop(1), crop(2));
    }

    #[test]
    fn no_crop_keeps_the_proportions() {
        let size = |w, h| prepare(&gradient(w, h), 64, Crop::None, 0, GEOMETRY).map(|p| p.dimensions());
        assert_eq!(size(300, 200).unwrap(), (96, 64));
        assert_eq!(size(200, 300).unwrap(), (64, 96));
        assert_eq!(size(500, 400).unwrap(), (80, 64));
        assert!(size(500, 100).unwrap_err().to_string().contains("4 to 1"));
    }

    #[test]
    fn sides_that_do_not_fit_the_model_are_refused() {
        assert_eq!(GEOMETRY.side("--height", None).unwrap(), 64);
        assert_eq!(GEOMETRY.side("--height", Some(72)).unwrap(), 72);
        let error = GEOMETRY.side("--height", Some(70)).unwrap_err();
        assert_eq!(error.hint().unwrap(), "try --height 72");
        assert!(GEOMETRY.side("--height", Some(1 << 20)).is_err());
    }
}
