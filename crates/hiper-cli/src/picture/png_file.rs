//! PNG files that say how they were made.

use image::RgbImage;

use crate::{Error, Result};

/// Encodes a picture with text chunks: pairs of keyword and text.
///
/// # Errors
/// When the encoder fails.
pub fn encode_png(picture: &RgbImage, texts: &[(&str, String)]) -> Result<Vec<u8>> {
    let failed = |e: png::EncodingError| {
        Error::refused(format!("a picture cannot be encoded as PNG: {e}"), "report this")
    };
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, picture.width(), picture.height());
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    for (keyword, text) in texts {
        // Plain chunks are what most programs read; they hold Latin-1 only.
        if text.chars().all(|c| u32::from(c) < 256 && c != '\0') {
            encoder.add_text_chunk((*keyword).into(), text.clone()).map_err(failed)?;
        } else {
            encoder.add_itxt_chunk((*keyword).into(), text.replace('\0', "")).map_err(failed)?;
        }
    }
    let mut writer = encoder.write_header().map_err(failed)?;
    writer.write_image_data(picture.as_raw()).map_err(failed)?;
    writer.finish().map_err(failed)?;
    Ok(bytes)
}

/// A sentence as part of a file's name: letters and digits of any script, lowercase, at most 48 bytes.
pub fn slug(text: &str) -> String {
    const MAX_BYTES: usize = 48;
    let mut slug = String::new();
    for c in text.chars().flat_map(char::to_lowercase) {
        if slug.len() + c.len_utf8() > MAX_BYTES {
            break;
        }
        if c.is_alphanumeric() {
            slug.push(c);
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
    }
    slug.trim_end_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_read_back() {
        let picture = RgbImage::from_pixel(3, 2, image::Rgb([9, 8, 7]));
        let texts =
            [("parameters", "café\nSteps: 20".to_owned()), ("hiper", "{\"prompt\":\"犬\"}".to_owned())];
        let bytes = encode_png(&picture, &texts).unwrap();
        let reader = png::Decoder::new(std::io::Cursor::new(&bytes)).read_info().unwrap();
        let info = reader.info();
        assert_eq!(info.uncompressed_latin1_text[0].text, texts[0].1);
        assert_eq!(info.utf8_text[0].get_text().unwrap(), texts[1].1);
        assert_eq!(image::load_from_memory(&bytes).unwrap().into_rgb8(), picture);
    }

    #[test]
    fn sentences_become_names() {
        assert_eq!(slug("A dog, sitting/on the beach!"), "a-dog-sitting-on-the-beach");
        assert_eq!(slug("../..\\🐕"), "");
        assert!(slug(&"犬 ".repeat(60)).len() <= 48);
    }
}
