//! The policies of policy/*.json: the compiled form that a guest embeds, and, with the feature `compiler`,
//! the compiler.
#![forbid(unsafe_code)]

#[cfg(feature = "compiler")]
pub mod bpf;
pub mod compiled;
#[cfg(feature = "compiler")]
pub mod format;
pub mod names;
#[cfg(feature = "compiler")]
pub mod policy;
#[cfg(feature = "compiler")]
pub mod table;
