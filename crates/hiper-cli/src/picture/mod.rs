//! Pictures: from files to tensors and back.

mod png_file;
mod prepare;
mod read;
mod sheet;
mod tensor;
mod text;

pub use png_file::{encode_png, slug};
pub use prepare::{Geometry, prepare};
pub use read::read_photo;
pub use sheet::{Cell, draw_sheet};
pub use tensor::{from_tensor, to_tensor};
