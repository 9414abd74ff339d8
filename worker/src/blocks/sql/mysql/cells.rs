//! Values of the binary protocol.

use mysql_async::consts::{ColumnFlags, ColumnType};
use mysql_async::{Column, Value};

use crate::blocks::sql::rows::Cell;

/// The number of the character set of what is no text.
const BINARY: u16 = 63;

/// One value of a column.
pub(super) fn cell<'a>(value: Option<&'a Value>, column: &Column) -> Cell<'a> {
    match value {
        None | Some(Value::NULL) => Cell::Null,
        Some(Value::Int(integer)) => Cell::Integer((*integer).into()),
        Some(Value::UInt(integer)) => Cell::Integer((*integer).into()),
        Some(Value::Float(real)) => Cell::real32(*real),
        Some(Value::Double(real)) => Cell::Real(*real),
        Some(Value::Date(year, month, day, hour, minute, second, micros)) => {
            let date = format!("{year:04}-{month:02}-{day:02}");
            let time = || time((*hour).into(), *minute, *second, *micros);
            Cell::Text(
                match column.column_type() {
                    ColumnType::MYSQL_TYPE_DATE | ColumnType::MYSQL_TYPE_NEWDATE => date,
                    // Our sessions are in UTC.
                    ColumnType::MYSQL_TYPE_TIMESTAMP | ColumnType::MYSQL_TYPE_TIMESTAMP2 => {
                        format!("{date}T{}Z", time())
                    }
                    _ => format!("{date}T{}", time()),
                }
                .into(),
            )
        }
        Some(Value::Time(is_negative, days, hours, minutes, seconds, micros)) => {
            let sign = if *is_negative { "-" } else { "" };
            Cell::Text(format!("{sign}{}", time(days * 24 + u32::from(*hours), *minutes, *seconds, *micros)).into())
        }
        Some(Value::Bytes(bytes)) => self::bytes(bytes, column),
    }
}

fn bytes<'a>(bytes: &'a [u8], column: &Column) -> Cell<'a> {
    match column.column_type() {
        ColumnType::MYSQL_TYPE_JSON => std::str::from_utf8(bytes).map_or(Cell::Bytes(bytes), Cell::Json),
        ColumnType::MYSQL_TYPE_DECIMAL | ColumnType::MYSQL_TYPE_NEWDECIMAL => Cell::text(bytes),
        ColumnType::MYSQL_TYPE_BIT => {
            let bits = bytes.iter().try_fold(0_i128, |bits, byte| bits.checked_mul(256)?.checked_add((*byte).into()));
            bits.map_or(Cell::Bytes(bytes), Cell::Integer)
        }
        _ if column.character_set() == BINARY && column.flags().contains(ColumnFlags::BINARY_FLAG) => {
            Cell::Bytes(bytes)
        }
        _ => Cell::text(bytes),
    }
}

fn time(hours: u32, minutes: u8, seconds: u8, micros: u32) -> String {
    let text = format!("{hours:02}:{minutes:02}:{seconds:02}");
    match micros {
        0 => text,
        micros => format!("{text}.{}", format!("{micros:06}").trim_end_matches('0')),
    }
}
