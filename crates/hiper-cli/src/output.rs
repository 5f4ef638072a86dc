//! The folder that a command writes to.

use std::path::{Path, PathBuf};

use image::RgbImage;

use crate::console::{Console, Event};
use crate::picture::encode_png;
use crate::{Error, Result};

/// A folder that exists and can be written.
pub struct Output<'a> {
    folder: PathBuf,
    console: &'a Console,
}

impl<'a> Output<'a> {
    /// Makes the folder if need be, and tries to write there: better now than after an hour's work.
    ///
    /// # Errors
    /// When it cannot be made or written.
    pub fn create(folder: &Path, console: &'a Console) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder, "cannot be made as the output folder"))?;
        let probe = folder.join(format!(".hiper-probe-{}", std::process::id()));
        let written = std::fs::write(&probe, b"hiper");
        let _ = std::fs::remove_file(&probe);
        written.map_err(Error::io(folder, "cannot be written as the output folder"))?;
        Ok(Self { folder: folder.to_owned(), console })
    }

    /// The path of one of its files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes a whole file or nothing.
    ///
    /// # Errors
    /// When the folder cannot be written or the disk is full.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<PathBuf> {
        let path = self.path(name);
        hiper_core::write_atomically(&path, content)?;
        Ok(path)
    }

    /// Writes a picture as PNG with text chunks, and says so.
    ///
    /// # Errors
    /// When the folder cannot be written or the disk is full.
    pub fn picture(
        &self,
        name: &str,
        what: &str,
        picture: &RgbImage,
        texts: &[(&str, String)],
    ) -> Result<PathBuf> {
        let path = self.write(name, &encode_png(picture, texts)?)?;
        self.wrote(&path, what);
        Ok(path)
    }

    /// Says that a file is written.
    pub fn wrote(&self, path: &Path, what: &str) {
        self.console.event(&Event::Wrote { file: &path.display().to_string(), what });
    }
}
