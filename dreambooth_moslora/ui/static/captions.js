(rows) => (rows || []).map(([photo, caption]) => `${photo}:${caption}`).join('\n')
