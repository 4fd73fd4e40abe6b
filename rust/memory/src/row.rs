//! A row of a burst, and what can be wrong with it.

use std::fmt;
use thiserror::Error;

/// A column of a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    /// Slot numbers.
    Slots,
    /// Where the bytes start, from the slot's start.
    Offsets,
    /// Bytes.
    Lengths,
    /// 1 where the packet continues in the next row.
    More,
}

impl fmt::Display for Column {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            Self::Slots => "slot",
            Self::Offsets => "offset",
            Self::Lengths => "length",
            Self::More => "more",
        })
    }
}

/// What a row's value breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Limit {
    /// The value has to be in this range.
    #[error("is not in {min} to {max}")]
    Range {
        /// The least legal value.
        min: i64,
        /// The greatest legal value.
        max: i64,
    },
    /// The slot has to be the burst's.
    #[error("does not belong to this burst")]
    NotOwned,
    /// A slot stands in one row only.
    #[error("stands in an earlier row too")]
    Twice,
    /// The last row ends its packet.
    #[error("in the last row continues a packet that has no more rows")]
    Unfinished,
}

/// A row that is not legal; nothing was done.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("burst row {row}: {column} {value} {limit}")]
pub struct RowError {
    /// The row, from 0.
    pub row: usize,
    /// The column.
    pub column: Column,
    /// The value that stands there.
    pub value: i64,
    /// What it breaks.
    pub limit: Limit,
}

/// A row as it stands in the columns, unchecked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawRow {
    /// The slot number.
    pub slot: i64,
    /// Where the bytes start, from the slot's start.
    pub offset: i64,
    /// Bytes.
    pub length: i64,
    /// 1 if the packet continues in the next row.
    pub more: i64,
}

/// A legal row: the slot exists, the bytes are inside it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// The slot number.
    pub slot: u32,
    /// Where the bytes start, from the slot's start.
    pub offset: u32,
    /// Bytes, at least 1.
    pub length: u32,
    /// Whether the packet continues in the next row.
    pub more: bool,
}
