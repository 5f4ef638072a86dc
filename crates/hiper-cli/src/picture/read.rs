//! Reading a photo: any common kind, upright, in 8-bit RGB.

use std::io::Cursor;
use std::path::Path;

use image::{DynamicImage, ImageDecoder, ImageError, ImageReader, Limits, RgbImage};
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Under this many pixels a side there is nothing to learn.
const MIN_SIDE: u32 = 16;
/// Decoding takes 3 to 16 bytes a pixel.
const MAX_PIXELS: u64 = 100_000_000;
/// Twice the bytes of the largest 8-bit picture.
const MAX_DECODED_BYTES: u64 = 1 << 30;
/// What is read of a file at most.
const MAX_FILE_BYTES: u64 = 512 << 20;

/// A decoded photo.
pub struct Photo {
    /// Upright pixels.
    pub pixels: RgbImage,
    /// SHA-256 of the file, in hexadecimal.
    pub hash: String,
}

/// Reads a photo of any kind that the `image` crate knows: grey, palette, 16-bit and transparent ones become 8-bit RGB
/// (transparency over white), and an EXIF orientation is applied. Colour profiles are not.
///
/// # Errors
/// When the file is not a picture, is damaged, or is too small or too large; the error says which.
pub fn read_photo(path: &Path) -> Result<Photo> {
    let file = path.display().to_string();
    let fail = |reason: String, hint: &str| Error::Picture { file: file.clone(), reason, hint: hint.into() };
    let metadata = std::fs::metadata(path).map_err(Error::io(path, "cannot be read"))?;
    if !metadata.is_file() {
        return Err(fail("is not a file".into(), "give the path of one picture"));
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(fail(format!("has {} bytes", metadata.len()), "give a picture file of at most 512 MiB"));
    }
    let bytes = std::fs::read(path).map_err(Error::io(path, "cannot be read"))?;
    let image = decode(&bytes).map_err(|(reason, hint)| fail(reason, hint))?;
    let hash = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Photo { pixels: over_white(image), hash })
}

const KINDS: &str = "give a PNG, JPEG, WebP, BMP, TIFF or GIF picture";

fn decode(bytes: &[u8]) -> std::result::Result<DynamicImage, (String, &'static str)> {
    let damaged = |error: ImageError| match error {
        ImageError::Limits(_) => ("needs more than 1 GiB to decode".to_owned(), "scale it down first"),
        other => (
            format!("cannot be decoded: {other}"),
            "open it in another program and save it again as PNG or JPEG",
        ),
    };
    let unknown = || ("is not a picture of a known kind".to_owned(), KINDS);
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|_| unknown())?;
    if reader.format().is_none() {
        return Err(unknown());
    }
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_DECODED_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(damaged)?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        let reason = format!("has {width}x{height} pixels, more than {} million", MAX_PIXELS / 1_000_000);
        return Err((reason, "scale it down first"));
    }
    if decoder.total_bytes() > MAX_DECODED_BYTES {
        return Err(("needs more than 1 GiB to decode".into(), "scale it down first"));
    }
    if width.min(height) < MIN_SIDE {
        let reason = format!("has {width}x{height} pixels, too few to learn from");
        return Err((
            reason,
            "give a picture of at least 16 pixels a side, better as many as the model draws",
        ));
    }
    let orientation = decoder.orientation().map_err(damaged)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(damaged)?;
    image.apply_orientation(orientation);
    Ok(image)
}

/// Transparent pixels over white, all others as they are.
fn over_white(image: DynamicImage) -> RgbImage {
    if !image.color().has_alpha() {
        return image.into_rgb8();
    }
    let rgba = image.into_rgba8();
    RgbImage::from_fn(rgba.width(), rgba.height(), |x, y| {
        let [r, g, b, a] = rgba.get_pixel(x, y).0.map(u32::from);
        let mix = |c: u32| ((c * a + 255 * (255 - a) + 127) / 255) as u8;
        image::Rgb([mix(r), mix(g), mix(b)])
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ImageFormat, Luma, LumaA, Rgb, Rgba};

    fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    /// Left half one grey, right half another.
    fn halves<P: image::Pixel<Subpixel = S> + 'static, S: image::Primitive + 'static>(
        left: P,
        right: P,
    ) -> image::ImageBuffer<P, Vec<S>> {
        image::ImageBuffer::from_fn(20, 16, |x, _| if x < 10 { left } else { right })
    }

    fn corners(bytes: &[u8]) -> [[u8; 3]; 2] {
        let image = over_white(decode(bytes).unwrap());
        assert_eq!(image.dimensions(), (20, 16));
        [image.get_pixel(0, 0).0, image.get_pixel(19, 15).0]
    }

    #[test]
    fn every_depth_and_transparency_becomes_rgb() {
        let cases: [DynamicImage; 6] = [
            halves(Luma([0u8]), Luma([200])).into(),
            halves(Luma([0u16]), Luma([200 * 257])).into(),
            halves(LumaA([0u8, 255]), LumaA([200, 255])).into(),
            halves(Rgb([0u8; 3]), Rgb([200; 3])).into(),
            halves(Rgb([0u16; 3]), Rgb([200 * 257; 3])).into(),
            halves(Rgba([0u16, 0, 0, 65535]), Rgba([200 * 257, 200 * 257, 200 * 257, 65535])).into(),
        ];
        for image in cases {
            assert_eq!(
                corners(&encoded(&image, ImageFormat::Png)),
                [[0; 3], [200; 3]],
                "{:?}",
                image.color()
            );
        }
    }

    #[test]
    fn every_lossless_format_is_read() {
        let image: DynamicImage = halves(Rgb([10u8, 20, 30]), Rgb([200, 100, 50])).into();
        for format in
            [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Bmp, ImageFormat::Tiff, ImageFormat::Gif]
        {
            assert_eq!(corners(&encoded(&image, format)), [[10, 20, 30], [200, 100, 50]], "{format:?}");
        }
    }

    #[test]
    fn transparency_is_laid_over_white() {
        let image: DynamicImage = halves(Rgba([0u8, 0, 0, 0]), Rgba([0, 0, 0, 51])).into();
        assert_eq!(corners(&encoded(&image, ImageFormat::Png)), [[255; 3], [204; 3]]);
    }

    #[test]
    fn a_palette_is_looked_up() {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 20, 16);
        encoder.set_color(png::ColorType::Indexed);
        encoder.set_palette(vec![1, 2, 3, 40, 50, 60]);
        let mut writer = encoder.write_header().unwrap();
        let indices: Vec<u8> = (0..320).map(|i| u8::from(i % 20 >= 10)).collect();
        writer.write_image_data(&indices).unwrap();
        writer.finish().unwrap();
        assert_eq!(corners(&bytes), [[1, 2, 3], [40, 50, 60]]);
    }

    #[test]
    fn the_exif_orientation_is_applied() {
        // Stored upright 16 wide, 20 high; orientation 6 says: turn a quarter clockwise to see it.
        let stored = RgbImage::from_fn(16, 20, |_, y| Rgb(if y < 10 { [250, 250, 250] } else { [5, 5, 5] }));
        let mut bytes = Vec::new();
        let mut encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 100);
        let mut exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0".to_vec();
        image::ImageEncoder::set_exif_metadata(&mut encoder, std::mem::take(&mut exif)).unwrap();
        encoder.encode_image(&stored).unwrap();
        let [left, right] = corners(&bytes);
        assert!(left[0] < 30 && right[0] > 220, "{left:?} {right:?}");
    }

    #[test]
    fn what_cannot_be_used_says_why() {
        let tiny = encoded(&RgbImage::new(1, 1).into(), ImageFormat::Png);
        let mut cut = encoded(&halves(Rgb([0u8; 3]), Rgb([200; 3])).into(), ImageFormat::Png);
        cut.truncate(cut.len() / 2);
        for (bytes, expected) in [
            (b"hello, I am a letter".to_vec(), "not a picture"),
            (Vec::new(), "not a picture"),
            (tiny, "1x1 pixels, too few"),
            (cut, "cannot be decoded"),
            (huge(20_000), "20000x20000 pixels, more than 100 million"),
        ] {
            let (reason, _) = decode(&bytes).unwrap_err();
            assert!(reason.contains(expected), "{reason}");
        }
    }

    /// The head of a PNG that claims so many pixels a side.
    fn huge(side: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, side, side);
        encoder.set_color(png::ColorType::Rgb);
        let mut writer = encoder.write_header().unwrap();
        writer.write_chunk(png::chunk::IDAT, &[0x78, 0x9c, 0x03, 0, 0, 0, 0, 1]).unwrap();
        drop(writer);
        bytes
    }
}
